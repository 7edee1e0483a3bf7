# SPDX-License-Identifier: Apache-2.0
"""Kernels on sharded arrays: each device computes the rows it has. Only the gradients of weight and bias need communication."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec

from normkit.arrays import Array
from normkit.spec import Problem

from .operands import PARAMETER, ROWS, STATISTIC, Signature, Slot


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
        rows, hidden = _row_axes(operand_shapes[0])
        if hidden:
            warnings.warn(
                f"the rows of normkit's operands are split over {hidden}: they are gathered first, "
                "because a norm needs whole rows; shard the other dimensions instead",
                stacklevel=2,
            )
        reduced = tuple(axis for axes in rows for axis in axes)

        def local(*arrays: Array) -> tuple[Array, ...]:
            own = replace(problem, shape=arrays[0].shape)
            computed = function(own, *arrays)
            return tuple(
                jax.lax.psum(array, reduced) if slot.kind == PARAMETER and reduced else array
                for slot, array in zip(results, computed, strict=True)
            )

        def sharding(slot: Slot) -> NamedSharding:
            specs = {ROWS: (*rows, ()), STATISTIC: rows, PARAMETER: ((),)}
            return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in specs[slot.kind])))

        return mesh, local, tuple(map(sharding, results)), tuple(map(sharding, operands))

    whole.def_partition(partition=partition, sharding_rule=_rule(operands, results))
    return list(whole(*given))


def needs_devices(primitive: Primitive) -> None:
    """Let the lowering of a primitive know the devices, without which by_rows cannot partition.

    JAX has no public name for this; custom_partitioning itself does the same.
    """
    prim_requires_devices_during_lowering.add(primitive)


def _row_axes(operand: Any) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Return the mesh axes of each leading dimension, and those of the last one."""
    spec = tuple(operand.sharding.spec)
    spec += (None,) * (len(operand.shape) - len(spec))
    axes = tuple(() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec)
    return axes[:-1], axes[-1]


def _rule(operands: Sequence[Slot], results: Sequence[Slot]) -> str:
    """Return the sharding rule: "r0 r1 n" for rows, "r0 r1" for statistics, "n" for parameters."""
    leading = " ".join(f"r{index}" for index in range(len(operands[0].shape) - 1))
    factors = {ROWS: f"{leading} n".strip(), STATISTIC: leading, PARAMETER: "n"}
    sides = (", ".join(factors[slot.kind] for slot in slots) for slots in (operands, results))
    return " -> ".join(sides)
