# SPDX-License-Identifier: Apache-2.0
"""Kernels on sharded arrays: each device computes the rows it has. Only the gradients of weight and bias need communication."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from normkit.arrays import Array, cast
from normkit.errors import UnsupportedError
from normkit.spec import Problem

from .operands import PARAMETER, ROWS, STATISTIC, Signature, Slot

WHOLE, BY_ROWS, UNKNOWN, PORTABLE = "whole", "by rows", "unknown", "portable"
"""Where the arrays of a call are: on one device, or those of a device inside shard_map; spread over several devices, which XLA
partitions; over several in a way that is not known; in a program for other processes or several platforms, which cannot hold
what `by_rows` makes, a callback into this process while XLA partitions."""


def by_rows(
    function: Callable[..., list[Array]], problem: Problem, signature: Signature, given: Sequence[Array]
) -> list[Array]:
    """Compute function(problem, *given) on each device's rows, with that device's problem.

    Args:
        function: computes the results that `signature` has from the operands it has.
        problem: of the whole arrays.
        signature: the operands and results, in order.
        given: the operands that there are.
    """
    if len(problem.shape) == 1:
        return function(problem, *given)
    operands = [slot for slot in signature.operands if slot.dtype]
    results = [slot for slot in signature.results if slot.dtype]

    @custom_partitioning
    def whole(*arrays: Array) -> tuple[Array, ...]:
        return tuple(function(problem, *arrays))

    def partition(mesh: Any, operand_shapes: Any, result_shapes: Any) -> Any:
        rows, hidden = _row_axes(operands, operand_shapes, mesh)
        summed = any(slot.kind == PARAMETER for slot in results)
        if summed:
            # what pads a device's share where the rows do not divide evenly must not be summed
            sizes = operand_shapes[0].shape
            rows = tuple(axes if size % _devices(mesh, axes) == 0 else () for axes, size in zip(rows, sizes, strict=False))
        if hidden:
            warnings.warn(
                f"the rows of normkit's operands are split over {hidden}: they are gathered first, "
                "because a norm needs whole rows; shard the other dimensions instead",
                stacklevel=2,
            )
        reduced = tuple(axis for axes in rows for axis in axes)

        def compute(*arrays: Array) -> list[Array]:
            own = replace(problem, shape=arrays[0].shape)
            if not (reduced and summed):
                return function(own, *arrays)
            # the sums of each device are rounded only when they are added up
            wide: dict[str, Any] = {name: getattr(own, name) and own.compute_dtype for name in ("weight_dtype", "bias_dtype")}
            computed = function(replace(own, **wide), *arrays)
            return [
                cast(jax.lax.psum(array, reduced), slot.dtype or "") if slot.kind == PARAMETER else array
                for slot, array in zip(results, computed, strict=True)
            ]

        def local(*arrays: Array) -> tuple[Array, ...]:
            return tuple(_local_p.bind(*arrays, compute=compute))

        def sharding(slot: Slot) -> NamedSharding:
            specs = {ROWS: (*rows, ()), STATISTIC: rows, PARAMETER: ((),)}
            return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in specs[slot.kind])))

        return mesh, local, tuple(map(sharding, results)), tuple(map(sharding, operands))

    # the mesh may be that of the operands alone, and not tell how a program that has another one spreads them: see _spec
    whole.def_partition(partition=partition, sharding_rule=_rule(operands, results), decode_shardings=False)
    return list(whole(*given))


def needs_devices(primitive: Primitive) -> None:
    """Let the lowering of a primitive know the devices, without which by_rows cannot partition.

    JAX has no public name for this; custom_partitioning itself does the same. JAX then wants one mesh of devices that are
    there for a whole program, so this is for programs that may come to have kernels.
    """
    prim_requires_devices_during_lowering.add(primitive)


class Placement(NamedTuple):
    """Where the arrays of a call are in a program.

    Attributes:
        kind: WHOLE, BY_ROWS, UNKNOWN or PORTABLE.
        context: that of the lowering; for BY_ROWS with the devices, which by_rows needs to be lowered.
    """

    kind: str
    context: Any


def placement(context: Any) -> Placement:
    """Return where the arrays of a call are.

    Args:
        context: what JAX gives to a lowering rule. Most of what is asked of it here is not documented.
    """
    module = context.module_context
    axes = module.axis_context
    if module.lowering_parameters.for_export or len(module.platforms) > 1:
        return Placement(PORTABLE, context)
    # where shard_map has taken some axes of a mesh already, XLA does not say how the others are used
    if getattr(axes, "manual_axes", None) or getattr(axes, "num_devices", 1) == 1:
        return Placement(WHOLE, context)
    placed = _with_devices(context)
    return Placement(UNKNOWN, context) if placed is None else Placement(BY_ROWS, placed)


def _with_devices(context: Any) -> Any | None:
    """Return the context with the devices of its program, which are several; None if they cannot be told.

    JAX names them where a primitive needs_devices. Elsewhere their mesh is that of the operands, and any devices will do,
    because XLA partitions by their places in the mesh.
    """
    axes = context.module_context.axis_context
    if axes.device_assignment is not None:
        return context
    meshes = {array.sharding.mesh for array in context.avals_in} - {jax.sharding.AbstractMesh((), ())}
    devices = tuple(jax.devices()[: axes.num_devices])
    if len(meshes) != 1 or len(devices) < axes.num_devices:
        return None
    (mesh,) = meshes
    if mesh.size != axes.num_devices:
        return None
    axes = replace(axes, device_assignment=devices, abstract_mesh=mesh)
    return context.replace(module_context=context.module_context.replace(axis_context=axes))


# What a device computes of its own rows, lowered outside of any mesh. In a mesh with explicit axes JAX would write shardings
# into it, which are of no use in a program that is partitioned already, and which XLA does not take: in the computation that
# adds two numbers for a psum they even end the process.
_local_p = Primitive("normkit_local")
_local_p.multiple_results = True


def _without_mesh() -> AbstractContextManager[None]:
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _plain(arrays: Iterable[Any]) -> list[Any]:
    return [jax.core.ShapedArray(array.shape, array.dtype) for array in arrays]


def _abstract_local(*given: Any, compute: Callable[..., list[Array]]) -> list[Any]:
    with _without_mesh():
        return _plain(jax.eval_shape(compute, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in given)))


def _lower_local(context: Any, *arrays: Any, compute: Callable[..., list[Array]]) -> Any:
    with _without_mesh():
        plain = context.replace(avals_in=_plain(context.avals_in), avals_out=_plain(context.avals_out))
        return mlir.lower_fun(compute, multiple_results=True)(plain, *arrays)


_local_p.def_abstract_eval(_abstract_local)
mlir.register_lowering(_local_p, _lower_local)


def _devices(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _row_axes(slots: Sequence[Slot], arrays: Sequence[Any], mesh: Any) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Return the mesh axes over which any operand has each leading dimension spread, and x has the last one."""
    if mesh.empty:
        raise UnsupportedError(
            "arrays sharded by a NamedSharding can be partitioned, and these are by another kind of sharding: "
            "use jax.shard_map, or implementation='reference'"
        )
    specs = [_spec(array, mesh) for slot, array in zip(slots, arrays, strict=True) if slot.kind == ROWS]
    spec = common_spec(specs, len(arrays[0].shape))
    axes = tuple(() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec)
    return axes[:-1], axes[-1]


def _spec(array: Any, mesh: Any) -> PartitionSpec:
    """Return how XLA has an array spread over a mesh; not at all, which is to gather it, where that is as over another mesh."""
    try:
        return parse_flatten_op_sharding(array.sharding._to_xla_hlo_sharding(array.ndim), mesh)[0]
    except (AssertionError, LookupError, NotImplementedError, StopIteration, ValueError):
        # what JAX raises, as the case may be, where a sharding is not one over the axes of the mesh
        warnings.warn(
            f"normkit's operands in a mesh of {dict(mesh.shape)} are spread as over another mesh: they are gathered first; "
            "use one mesh in the program",
            stacklevel=2,
        )
        return PartitionSpec()


def common_spec(specs: Iterable[Any], dimensions: int) -> list[Any]:
    """Return for each dimension how the first array that has it spread does, over axes that no dimension before it takes.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> common_spec([P(None, "b"), P(("a", "b"))], 3)
        [('a', 'b'), None, None]
    """
    padded = [(*spec, *(None,) * (dimensions - len(spec))) for spec in specs]
    common: list[Any] = []
    taken: set[str] = set()
    for choices in zip(*padded, strict=True):
        for part in choices:
            axes = {part} if isinstance(part, str) else set(part or ())
            if axes and not axes & taken:
                break
        else:
            part, axes = None, set()
        common.append(part)
        taken |= axes
    return common


def _rule(operands: Sequence[Slot], results: Sequence[Slot]) -> str:
    """Return the sharding rule: "r0 r1 n0" for rows, "r0 r1" for statistics, "n1" for parameters.

    Each array has a last dimension of its own, so that one which is sharded there does not have others sharded and gathered.
    """
    leading = [f"r{index}" for index in range(len(operands[0].shape) - 1)]
    numbers = itertools.count()

    def factors(slot: Slot) -> str:
        own = [] if slot.kind == STATISTIC else [f"n{next(numbers)}"]
        return " ".join([*([] if slot.kind == PARAMETER else leading), *own])

    sides = [", ".join(map(factors, slots)) for slots in (operands, results)]
    return " -> ".join(sides)
