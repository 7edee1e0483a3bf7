# SPDX-License-Identifier: Apache-2.0
"""Operands and results of the two primitives: which of them a problem has, and of what shape and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from normkit.compile import gradient_dtypes, operand_dtypes
from normkit.interface import Wanted
from normkit.spec import Problem

ROWS, STATISTIC, PARAMETER = "rows", "statistic", "parameter"
"""The kinds of array: one value for each element of x, for each row, or for each column."""

_KINDS = dict.fromkeys(("mean", "rstd"), STATISTIC) | dict.fromkeys(("weight", "bias", "dweight", "dbias"), PARAMETER)


class Slot(NamedTuple):
    """A place for an array; its dtype is None where the problem has none."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None

    @property
    def kind(self) -> str:
        """ROWS, STATISTIC or PARAMETER."""
        return _KINDS.get(self.name, ROWS)


class Signature(NamedTuple):
    """Operands and results of a primitive, in order."""

    operands: tuple[Slot, ...]
    results: tuple[Slot, ...]

    def given(self, operands: Sequence[Any]) -> list[Any]:
        """Return the operands that there are."""
        return [operand for slot, operand in zip(self.operands, operands, strict=True) if slot.dtype is not None]

    def made(self, results: Iterable[Any]) -> list[Any]:
        """Return the results that there are."""
        return [result for slot, result in zip(self.results, results, strict=True) if slot.dtype is not None]

    def spread(self, results: Iterable[Any]) -> list[Any]:
        """Return the results with None in the place of those that there are not."""
        return _spread(self.results, results)

    def named(self, given: Iterable[Any]) -> dict[str, Any]:
        """Return all operands by name, with None for those that there are not."""
        return dict(zip((slot.name for slot in self.operands), _spread(self.operands, given), strict=True))


def forward_signature(problem: Problem) -> Signature:
    """Return operands and results of the forward primitive, in the order of `Kernels.forward` and `Forward`."""
    dtypes = operand_dtypes(problem)
    operands = _slots(problem, ("x", "residual", "weight", "bias"), dtypes)
    return Signature(operands, _slots(problem, ("y", "residual_out", "mean", "rstd"), dtypes))


def backward_signature(problem: Problem, wanted: Wanted) -> Signature:
    """Return operands and results of the backward primitive, in the order of `Kernels.backward` and `Gradients`."""
    dtypes = gradient_dtypes(problem, wanted)
    for name, parameter in (("dweight", problem.weight_dtype), ("dbias", problem.bias_dtype)):
        dtypes[name] = dtypes[name] and parameter
    operands = _slots(problem, ("dy", "dresidual_out", "h", "weight", "mean", "rstd"), dtypes)
    return Signature(operands, _slots(problem, ("dx", "dresidual", "dweight", "dbias"), dtypes))


def _slots(problem: Problem, names: Iterable[str], dtypes: dict[str, str | None]) -> tuple[Slot, ...]:
    shapes = {ROWS: problem.shape, STATISTIC: problem.shape[:-1], PARAMETER: problem.shape[-1:]}
    return tuple(Slot(name, shapes[_KINDS.get(name, ROWS)], dtypes[name]) for name in names)


def _spread(slots: Iterable[Slot], arrays: Iterable[Any]) -> list[Any]:
    remaining = iter(arrays)
    return [None if slot.dtype is None else next(remaining) for slot in slots]
