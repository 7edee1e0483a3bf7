# SPDX-License-Identifier: Apache-2.0
"""Whether a contestant is right: its results against the reference in float64, by the bounds of `normkit.tolerance`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..arrays import numpy_dtype
from ..errors import NormkitError
from ..tolerance import Expectation, expected_backward, expected_forward, worst
from .contest import Arrays, Contest

VERIFIED_ROWS = 64
"""Rows that are verified, first to last: but for dweight and dbias, the results of a row do not depend on the others."""

VERIFIED_ELEMENTS = 2**21
"""Of rows so long that 64 have more, fewer are verified, but not under 4: the reference takes its time."""


class WrongResultError(NormkitError, ArithmeticError):
    """A result of normkit that is not within its bound."""


def verified_rows(rows: int, hidden_size: int) -> Any:
    """Return the indices of the rows that are verified, spread over all.

    Example:
        >>> verified_rows(1000, 2**20)
        array([  0, 333, 666, 999])
    """
    few = min(VERIFIED_ROWS, max(4, VERIFIED_ELEMENTS // hidden_size), rows)
    return np.linspace(0, rows - 1, few).astype(int)


def sparse(contest: Contest, arrays: Arrays) -> Arrays:
    """Return the arrays with a dy that is zero but in the verified rows, so that dweight and dbias are sums over these."""
    dy = 0 * arrays.dy
    dy[verified_rows(*contest.case)] = arrays.dy[verified_rows(*contest.case)]
    return arrays._replace(dy=dy)


def expectations(contest: Contest, arrays: Arrays) -> dict[str, Expectation]:
    """Return what is right, by name: the verified rows, and the sums over them.

    Args:
        contest: what is computed.
        arrays: as `sparse` returns them.
    """
    chosen = verified_rows(*contest.case)
    problem = contest.of_rows(len(chosen)).problem
    given = arrays.map(lambda array: _few(array, chosen))
    expected = dict(zip(("y", "residual_out"), expected_forward(problem, *given[:4]), strict=True))
    if "backward" in contest.pass_:
        # as torch and JAX round a sum of two arrays, and as every contestant hands it on
        h = (given.x.astype(np.float32) + given.residual.astype(np.float32)).astype(numpy_dtype(contest.dtype))
        expected |= expected_backward(problem, given.dy, given.dresidual_out, h, given.weight)
    return expected


def worst_error(contest: Contest, expected: dict[str, Expectation], results: dict[str, Any]) -> float:
    """Return the largest error of results, in units of its bound."""
    chosen = verified_rows(*contest.case)
    return max(worst(_few(array, chosen), expected[name]) for name, array in results.items())


def spoil(results: Iterable[Any]) -> None:
    """Overwrite results where that can be done: who gets their memory next and writes nothing there is not to be right."""
    for array in results:
        if hasattr(array, "fill_"):
            array.fill_(math.nan)
        elif isinstance(array, np.ndarray) and array.flags.writeable:
            array.fill(math.nan)


def _few(array: Any, chosen: Any) -> Any:
    """Return the rows that are verified, or a whole vector, as a NumPy array; a tensor in float32, which holds any."""
    few = array[chosen] if array.ndim == 2 else array
    return np.asarray(few.detach().float().cpu() if hasattr(few, "detach") else few)
