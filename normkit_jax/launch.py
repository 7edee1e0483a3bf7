# SPDX-License-Identifier: Apache-2.0
"""The `triton` implementation: JAX arrays + plan -> the kernels of normkit.kernels, as custom calls in the compiled program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType

import jax
import jax.numpy as jnp

from normkit import plan
from normkit.arrays import Array, dtype_name, numpy_dtype
from normkit.compile import CompiledKernel, compile_step
from normkit.errors import LaunchError
from normkit.failures import Failures, could_not, is_short_of_memory, triton_errors
from normkit.interface import Forward, Gradients, Rejected, Wanted
from normkit.spec import Problem

from . import message
from .operands import Signature, backward_signature, forward_signature

PER_DEVICE = True
"""Whether XLA has to be told that each device can compute the rows it has; see `normkit_jax.partition`."""

TARGET = "triton_kernel_call_ffi"
"""The custom call that jaxlib's CUDA and ROCm plugins register."""

Result = tuple[tuple[int, ...], str] | None
"""Shape and dtype of an array that a kernel makes, None where it makes none."""

_PLATFORMS = ("cuda", "rocm")
# Where the plugins learnt to load machine code that is not PTX; without it there is no way to launch on ROCm.
_FIRST_JAX_WITH_BINARIES = (0, 11, 1)
_failures = Failures()


def supports(problem: Problem) -> Rejected | None:
    """Accept float32, bfloat16 and float16 on CUDA, and on ROCm from jax 0.11.1, where Triton is installed."""
    if problem.platform not in _PLATFORMS:
        return Rejected(f"Triton runs on {', '.join(_PLATFORMS)}, not on {problem.platform}")
    if problem.platform == "rocm" and jax.__version_info__ < _FIRST_JAX_WITH_BINARIES:
        return Rejected(f"on rocm it needs jax 0.11.1 or newer, and this is {jax.__version__}")
    if not _has_triton():
        return Rejected("triton is not installed: pip install triton")
    if not all(isinstance(size, int) for size in problem.shape):
        return Rejected(f"its launches need sizes known while compiling, and the shape is {problem.shape}")
    if problem.rows >= 2**31:
        return Rejected(f"its launches count rows in 32 bits, and there are {problem.rows}")
    failed = _failures.reason(_as_explained(problem))
    return plan.supports(problem) if failed is None else Rejected(failed)


def _as_explained(problem: Problem) -> Problem:
    """Return the problem without what `explain` does not know of a call; what fails is for calls of every kind."""
    return replace(problem, needs_grad=False, portable=False, spread=False)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def forward(problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Forward:
    """Compute y, residual_out and, if a backward may follow, the statistics, in one launch."""
    results = _results(forward_signature(problem))
    if not problem.rows:
        return Forward(**_zeros(results))
    arrays = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    scalars = {"rows": problem.rows, "eps": problem.spec.eps, "weight_offset": problem.spec.weight_offset}
    overwrites = {"x": "y", "residual": "residual_out"} if problem.in_place else {}
    with _failures.remembered(_as_explained(problem)):
        made = _launch(plan.forward_plan(problem), problem.arch, arrays, scalars, results, overwrites)
    return Forward(**dict.fromkeys(results) | made)


# JAX's arrays do not change: in place says which memory XLA may give to y and residual_out, and forward passes that on.
forward_ = forward


def backward(
    problem: Problem,
    wanted: Wanted,
    dy: Array,
    dresidual_out: Array | None,
    h: Array,
    weight: Array | None,
    mean: Array | None,
    rstd: Array | None,
) -> Gradients:
    """Compute the gradients: dx, dresidual and partial sums in one or two launches, then the total of dweight and of dbias."""
    results = _results(backward_signature(problem, wanted))
    if not problem.rows:
        return Gradients(**_zeros(results))
    planned = plan.backward_plan(problem, wanted)
    partial_sums = ((planned.parts, problem.hidden_size), "float32")
    outputs = {name: partial_sums if result and name in ("dweight", "dbias") else result for name, result in results.items()}
    shares = ((problem.rows, planned.blocks), "float32") if planned.blocks else None
    outputs |= {"x_hat_g": shares, "g": shares if problem.spec.subtract_mean else None}
    arrays = {"dy": dy, "dresidual_out": dresidual_out, "h": h, "weight": weight, "mean": mean, "rstd": rstd}
    scalars = {"rows": problem.rows, "rows_per_program": planned.rows_per_program, "weight_offset": problem.spec.weight_offset}
    made: dict[str, Array | None] = dict.fromkeys(results)
    with _failures.remembered(_as_explained(problem)):
        for step in planned.steps:
            missing = {name: result for name, result in outputs.items() if made.get(name) is None}
            made |= _launch(step, problem.arch, arrays | made, scalars, missing)
        for name in ("dweight", "dbias"):
            if made[name] is not None:
                total = _launch(
                    planned.total,
                    problem.arch,
                    {"partial": made[name]},
                    {"programs": planned.parts},
                    {"total": results[name]},
                )
                made[name] = total["total"]
    return Gradients(**{name: made[name] for name in results})


def _results(signature: Signature) -> dict[str, Result]:
    return {slot.name: None if slot.dtype is None else (slot.shape, slot.dtype) for slot in signature.results}


def _zeros(results: Mapping[str, Result]) -> dict[str, Array | None]:
    return {name: None if result is None else jnp.zeros(result[0], numpy_dtype(result[1])) for name, result in results.items()}


def _launch(
    step: plan.Step,
    arch: str | None,
    arrays: Mapping[str, Array | None],
    scalars: Mapping[str, float],
    results: Mapping[str, Result],
    overwrites: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Array]:
    """Launch one kernel, which takes its arguments by name, and return by name those of the results that it makes.

    A result takes the memory of the array that it overwrites; XLA copies that first where it is still needed.
    """
    dtypes = {name: dtype_name(array.dtype) for name, array in arrays.items() if array is not None}
    dtypes |= {name: result[1] for name, result in results.items() if result}
    assert arch, "the lowering of the primitives sets it"
    compiled = _compiled(step, dtypes, arch)
    pointers = [name.removesuffix("_ptr") for name, kind in compiled.arguments.items() if kind.startswith("*")]
    parameters = [
        # a scalar that is not given is one of strided rows, and XLA's arrays are contiguous
        message.array() if kind.startswith("*") else message.scalar(scalars.get(name, 0), kind)
        for name, kind in compiled.arguments.items()
    ]
    is_cuda = arch.startswith("sm_")
    kernel = message.kernel(
        compiled.name,
        num_warps=compiled.num_warps,
        shared=compiled.shared,
        ptx=compiled.assembly if is_cuda else "",
        binary=compiled.binary,
        compute_capability=int(compiled.arch.removeprefix("sm_")) if is_cuda else 0,
    )
    made = {name: result for name in pointers if (result := results.get(name))}
    given = [name for name in pointers if name not in made]
    aliases = {given.index(old): list(made).index(new) for old, new in overwrites.items()}
    shapes = [jax.ShapeDtypeStruct(shape, numpy_dtype(dtype)) for shape, dtype in made.values()]
    call = jax.ffi.ffi_call(TARGET, shapes, input_output_aliases=aliases)
    opaque = message.launch(f"normkit_{step.kernel}", kernel, step.grid, parameters)
    return dict(zip(made, call(*(arrays[name] for name in given), opaque=opaque), strict=True))


def _compiled(step: plan.Step, dtypes: Mapping[str, str | None], arch: str) -> CompiledKernel:
    try:
        return compile_step(step, dtypes, arch)
    except triton_errors() as error:
        if is_short_of_memory(error):
            raise
        raise LaunchError(could_not("compile", f"{step.kernel} for {arch}", error)) from error
