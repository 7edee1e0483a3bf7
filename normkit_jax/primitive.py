# SPDX-License-Identifier: Apache-2.0
"""The norm and its gradient as two JAX primitives: one lowering for each platform, and one batching rule each.

What a call computes is its Problem, a static parameter. The implementation is chosen when the call is lowered, because only
then is the platform known: one traced function may be compiled for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from normkit import reference, registry
from normkit.arrays import Array, cast, numpy_dtype, rounded
from normkit.interface import Forward, Gradients, Kernels, Wanted
from normkit.spec import Problem

from . import device, dispatch
from .implementations import TABLE
from .operands import PARAMETER, ROWS, STATISTIC, Signature, Slot, backward_signature, forward_signature
from .partition import BY_ROWS, PORTABLE, UNKNOWN, by_rows, common_spec, needs_devices, placement
from .target import arch_of, expected

# JAX's names; "other" stands for every platform without kernels of its own, such as tpu.
PLATFORMS = ("cpu", "cuda", "rocm", "oneapi", "other")

forward_p = Primitive("normkit_forward")
backward_p = Primitive("normkit_backward")

_SIGNATURES: dict[str, Callable[..., Signature]] = {"forward": forward_signature, "backward": backward_signature}


def forward(problem: Problem, implementation: str | None, *operands: Array | None) -> Forward:
    """Compute y, residual_out and the statistics of x, residual, weight and bias."""
    signature = forward_signature(problem)
    results = _bind(forward_p, *signature.given(operands), problem=problem, implementation=implementation)
    return Forward(*signature.spread(results))


def backward(problem: Problem, implementation: str | None, wanted: Wanted, *operands: Array | None) -> Gradients:
    """Compute the gradients from dy, dresidual_out, h, weight, mean and rstd."""
    signature = backward_signature(problem, wanted)
    results = _bind(backward_p, *signature.given(operands), problem=problem, implementation=implementation, wanted=wanted)
    return Gradients(*signature.spread(results))


def _bind(primitive: Primitive, *given: Array, **parameters: Any) -> list[Array]:
    if expected():
        needs_devices(primitive)
    results: list[Array] = primitive.bind(*given, **parameters)
    return results


def _compute(
    function: str, problem: Problem, implementation: str | None, given: Sequence[Array], **wanted: Wanted
) -> list[Array]:
    """Choose an implementation and have its forward or backward compute, or the next one's where its kernels do not compile."""
    signature = _SIGNATURES[function](problem, **wanted)

    def run(kernels: Kernels) -> list[Array]:
        return signature.made(getattr(kernels, function)(problem, **wanted, **signature.named(given)))

    return registry.compute(problem, TABLE, implementation, run)[1]


def _batch_forward(
    given: Sequence[Array], dims: Sequence[int | None], *, problem: Problem, implementation: str | None
) -> tuple[list[Array], list[int]]:
    """Fold the mapped axis into the rows. A mapped weight or bias is applied afterwards, in the same arithmetic."""
    signature = forward_signature(problem)
    arrays, axes, folded = _fold(signature, given, dims, problem)
    if axes["weight"] is None and axes["bias"] is None:
        results = forward(folded, implementation, *arrays.values())
    else:
        compute = problem.compute_dtype
        plain = replace(folded, spec=replace(problem.spec, weight_offset=0.0), weight_dtype=None, bias_dtype=None)
        plain = replace(plain, out_dtype=compute, in_place=False)
        # float64 where only the weight or the bias is, which are applied afterwards
        plain = plain if plain.compute_dtype == compute else replace(plain, x_dtype=compute)
        x_hat, *others = forward(plain, implementation, cast(arrays["x"], plain.x_dtype), arrays["residual"], None, None)
        if problem.spec.rounding == "hf" and plain.x_dtype != problem.x_dtype:
            x_hat = rounded(x_hat, problem.x_dtype)
        scale = jax.vmap(partial(reference.scale_and_shift, problem), in_axes=(0, axes["weight"], axes["bias"]))
        results = Forward(scale(x_hat, arrays["weight"], arrays["bias"]), *others)
    computed = [result for result in results if result is not None]
    return computed, [0] * len(computed)


def _batch_backward(
    given: Sequence[Array],
    dims: Sequence[int | None],
    *,
    problem: Problem,
    implementation: str | None,
    wanted: Wanted,
) -> tuple[list[Array], list[int]]:
    """Fold the mapped axis into the rows for dx and dresidual; dweight and dbias are sums of each part of it alone."""
    signature = backward_signature(problem, wanted)
    arrays, axes, folded = _fold(signature, given, dims, problem)
    sums = Gradients(None, None, None, None)
    if wanted.dweight or wanted.dbias:
        function = partial(reference.backward, problem, Wanted(False, False, wanted.dweight, wanted.dbias))
        sums = jax.vmap(function, in_axes=tuple(axes.values()))(*arrays.values())
    if axes["weight"] is not None:
        compute = problem.compute_dtype
        weight = reference.effective_weight(problem.spec, cast(arrays["weight"], compute))
        weight = weight.reshape(weight.shape[0], *(1,) * (len(problem.shape) - 1), weight.shape[1])
        arrays |= {"dy": cast(arrays["dy"], compute) * weight, "weight": None}
        folded = replace(folded, spec=replace(problem.spec, weight_offset=0.0), weight_dtype=None, out_dtype=compute)
        if folded.compute_dtype != compute:
            folded = replace(folded, x_dtype=compute)
            arrays["h"] = cast(arrays["h"], folded.h_dtype)
    rows = Gradients(None, None, None, None)
    if wanted.dx or wanted.dresidual:
        rows = backward(folded, implementation, Wanted(wanted.dx, wanted.dresidual, False, False), *arrays.values())
        rows = rows if rows.dx is None else rows._replace(dx=cast(rows.dx, problem.x_dtype))
    computed = [gradient for gradient in (*rows[:2], *sums[2:]) if gradient is not None]
    return computed, [0] * len(computed)


def _fold(
    signature: Signature, given: Sequence[Array], dims: Sequence[int | None], problem: Problem
) -> tuple[dict[str, Any], dict[str, int | None], Problem]:
    """Return the operands with the mapped axis first, which have it, and the problem with it as one more dimension."""
    size = next(array.shape[dim] for array, dim in zip(given, dims, strict=True) if dim is not None)
    axes: dict[str, int | None] = {}
    arrays: dict[str, Any] = {}
    named = signature.named(zip(given, dims, strict=True))
    for slot in signature.operands:
        array, dim = named[slot.name] or (None, None)
        if array is not None and dim is not None:
            array = jnp.moveaxis(array, dim, 0)
        elif array is not None and slot.kind != PARAMETER:
            array = jnp.broadcast_to(array, (size, *array.shape))
        arrays[slot.name] = array
        axes[slot.name] = 0 if array is not None and array.ndim > len(slot.shape) else None
    return arrays, axes, replace(problem, shape=(size, *problem.shape))


def lowering(function: str, lowered_for: str) -> Callable[..., Any]:
    """Return the rule that lowers a primitive, "forward" or "backward", for a platform: trace what is chosen for it."""

    def rule(context: Any, *operands: Any, problem: Problem, implementation: str | None, **wanted: Wanted) -> Any:
        kind, placed = placement(context)
        platform = device.PLATFORMS.get(lowered_for, lowered_for)
        problem = replace(problem, platform=platform, portable=kind == PORTABLE, spread=kind == UNKNOWN)
        problem = _with_arch(problem, implementation, device.lowered_for(context))

        def compute(problem: Problem, *given: Array) -> list[Array]:
            return _compute(function, problem, implementation, given, **wanted)

        def compute_by_rows(*given: Array) -> list[Array]:
            return by_rows(compute, problem, _SIGNATURES[function](problem, **wanted), given)

        if kind == BY_ROWS and getattr(dispatch.kernels_of(problem, implementation), "PER_DEVICE", False):
            return mlir.lower_fun(compute_by_rows, multiple_results=True)(placed, *operands)
        return mlir.lower_fun(partial(compute, problem), multiple_results=True)(context, *operands)

    return rule


def _with_arch(problem: Problem, implementation: str | None, devices: Iterable[jax.Device]) -> Problem:
    """Return the problem with the architecture to compile for, which the reference does not need."""
    kernels = dispatch.kernels_of(problem, implementation)
    return problem if kernels is reference else replace(problem, arch=arch_of(problem.platform, devices))


def _define(primitive: Primitive, function: str, batch: Callable[..., Any]) -> None:
    signature = _SIGNATURES[function]

    @lru_cache(maxsize=1024)
    def compiled(**parameters: Any) -> Any:
        return jax.jit(partial(primitive.bind, **parameters))

    def implementation_of(*given: Array, **parameters: Any) -> list[Array]:
        if getattr(jax.config, "jax_disable_jit"):  # noqa: B009 (its type does not know it)
            return step_by_step(*given, **parameters)
        results: list[Array] = compiled(**parameters)(*given)
        return results

    def step_by_step(*given: Array, problem: Problem, implementation: str | None, **wanted: Wanted) -> list[Array]:
        problem = _with_arch(problem, implementation, given[0].devices())
        return _compute(function, problem, implementation, given, **wanted)

    def abstract(*given: Any, problem: Problem, implementation: str | None, **wanted: Wanted) -> list[Any]:
        operands, results = signature(problem, **wanted)
        slots = [slot for slot in operands if slot.dtype is not None]
        rows = [array for slot, array in zip(slots, given, strict=True) if slot.kind == ROWS]
        return [_aval(rows, slot) for slot in results if slot.dtype is not None]

    primitive.multiple_results = True
    primitive.def_impl(implementation_of)
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    for platform in PLATFORMS:
        mlir.register_lowering(primitive, lowering(function, platform), platform=None if platform == "other" else platform)


def _aval(rows: Sequence[Any], slot: Slot) -> Any:
    """Return the abstract value of a result: spread like the operands' rows, and varying over the same manual axes."""
    spec = common_spec([array.sharding.spec for array in rows], len(rows[0].shape))
    first = next((array for array in rows if not array.sharding.mesh.empty), rows[0])
    own = {ROWS: spec, STATISTIC: spec[:-1], PARAMETER: spec[-1:]}[slot.kind]
    sharding = first.sharding.update(spec=jax.sharding.PartitionSpec(*own))
    return first.update(shape=slot.shape, dtype=numpy_dtype(slot.dtype or ""), weak_type=False, sharding=sharding)


_define(forward_p, "forward", _batch_forward)
_define(backward_p, "backward", _batch_backward)
