# SPDX-License-Identifier: Apache-2.0
"""Whether a contestant is right: its results against the reference in float64, by the bounds of `normkit.tolerance`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import numpy_dtype
from ..errors import NormkitError
from ..tolerance import expected_backward, expected_forward, worst
from .contest import Arrays, Contest

VERIFIED_ROWS = 64
"""Rows that are verified, first to last: but for dweight and dbias, the results of a row do not depend on the others."""


class WrongResultError(NormkitError, ArithmeticError):
    """A result of normkit that is not within its bound."""


def verified_rows(contest: Contest) -> Any:
    """Return the indices of the rows that are verified, spread over all."""
    rows = contest.case.rows
    return np.linspace(0, rows - 1, min(VERIFIED_ROWS, rows)).astype(int)


def sparse(contest: Contest, arrays: Arrays) -> Arrays:
    """Return the arrays with a dy that is zero but in the verified rows, so that dweight and dbias are sums over these."""
    dy = 0 * arrays.dy
    dy[verified_rows(contest)] = arrays.dy[verified_rows(contest)]
    return arrays._replace(dy=dy)


def worst_error(contest: Contest, arrays: Arrays, results: dict[str, Any]) -> float:
    """Return the largest error in units of its bound, of the verified rows and of the sums over them.

    Args:
        contest: what was computed.
        arrays: as `sparse` returns them.
        results: by name.
    """
    chosen = verified_rows(contest)
    problem = contest.of_rows(len(chosen)).problem
    given = arrays.map(lambda array: _few(array, chosen))
    expected = dict(zip(("y", "residual_out"), expected_forward(problem, *given[:4]), strict=True))
    # as torch and JAX round a sum of two arrays, and as every contestant hands it on
    h = (given.x.astype(np.float32) + given.residual.astype(np.float32)).astype(numpy_dtype(contest.dtype))
    expected |= expected_backward(problem, given.dy, given.dresidual_out, h, given.weight)
    return max(worst(_few(array, chosen), expected[name]) for name, array in results.items())


def _few(array: Any, chosen: Any) -> Any:
    """Return the rows that are verified, or a whole vector, as a NumPy array; a tensor in float32, which holds any."""
    few = array[chosen] if array.ndim == 2 else array
    return np.asarray(few.detach().float().cpu() if hasattr(few, "detach") else few)
