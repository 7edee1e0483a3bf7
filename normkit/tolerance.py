# SPDX-License-Identifier: Apache-2.0
r"""How far a right result may be from the exact one: bounds derived from unit roundoff and reduction length.

Every bound is the first-order effect of these errors, and nothing else; docs/numerics.md derives them line by line.

- Each operation in the compute dtype errs by at most its unit roundoff u, relatively.
- A sum of n terms errs by at most 2 sqrt(n) u relative to the sum of their absolute values: with independent rounding errors,
  uniform in [-u, u], a sequential sum, the worst order, has a standard deviation of u sqrt(n) / 3; six of these are allowed.
- h is rounded to residual_out's dtype, or not, as the rounding policy says; with None either is right.
- Each result is rounded once to its own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .arrays import Array
from .spec import Problem

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Where results are too small for a relative error: the smallest normal number, as hardware and XLA may flush subnormals;
# float16 is never flushed, so half its smallest subnormal.
UNDERFLOW = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}
# Errors of a few operations on one value: the square, the division by n, adding eps; and the reciprocal root, which GPUs
# approximate to 2 ulp.
_SQUARES, _ROOT = 3, 4
# What the second order adds to these first-order bounds while they are small.
_SECOND_ORDER = 1.02


@dataclass(frozen=True)
class Expectation:
    """The exact value of a result, and how far a right one may be from it; both float64."""

    value: FloatArray
    bound: FloatArray


def sum_error(terms: int, unit: float) -> float:
    """Bound on the error of a sum of so many terms, relative to the sum of their absolute values."""
    return 2 * math.sqrt(terms) * unit


def expected_forward(
    problem: Problem,
    x: Array,
    residual: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    residual_out: Array | None = None,
) -> tuple[Expectation, Expectation]:
    """Return what y and residual_out (h where none is computed) must be within.

    Args:
        problem: the call.
        x: NumPy array, like the others.
        residual: as given to the call.
        weight: as given to the call.
        bias: as given to the call.
        residual_out: what the implementation returned; where the policy is to normalise just that, y is judged by it.

    Example:
        >>> import numpy as np
        >>> from normkit.spec import NormSpec, Operand, describe
        >>> problem = describe(NormSpec("rms"), Operand((1, 2), "bfloat16"), out_dtype="float32")
        >>> y, _ = expected_forward(problem, np.array([[3.0, -3.0]]))
        >>> y.value.round(3), bool((y.bound < 1e-6).all())
        (array([[ 1., -1.]]), True)
    """
    unit = UNIT_ROUNDOFF[problem.compute_dtype]
    h = _float64(x) if residual is None else _float64(x) + _float64(residual)
    h_error = unit if residual is not None else 0.0
    stored = _expectation(h, h_error * np.abs(h), problem.h_dtype)
    if problem.spec.rounding in ("stored", "hf") and residual_out is not None:
        h, h_error = _float64(residual_out), 0.0
    elif problem.spec.rounding != "sum" and problem.residual_out_dtype:
        h_error += UNIT_ROUNDOFF[problem.residual_out_dtype]
    row = _statistics(problem, h, h_error)
    x_hat = row.centred * row.rstd
    x_hat_error = row.x_hat_error(h_error * np.abs(h))
    if problem.spec.rounding == "hf":
        x_hat_error = _rounded(x_hat, x_hat_error, problem.x_dtype)
    gain = _gain(problem, weight)
    y = x_hat * gain + (0.0 if bias is None else _float64(bias))
    y_error = np.abs(gain) * (x_hat_error + 2 * unit * np.abs(x_hat)) + (0.0 if bias is None else unit * np.abs(y))
    return _expectation(y, y_error, problem.out_dtype), stored


def expected_backward(
    problem: Problem, dy: Array, dresidual_out: Array | None, h: Array, weight: Array | None = None
) -> dict[str, Expectation]:
    """Return what dx, dresidual, dweight and dbias must be within, for those of them that the problem has.

    Args:
        problem: the call.
        dy: NumPy array, like the others; the gradient of y.
        dresidual_out: the gradient of residual_out, if any.
        h: the h that the caller got: residual_out, or x where none was computed.
        weight: as given to the call.
    """
    unit = UNIT_ROUNDOFF[problem.compute_dtype]
    h, dy = _float64(h), _float64(dy)
    row = _statistics(problem, h, 0.0)
    x_hat, x_hat_error = row.centred * row.rstd, row.x_hat_error(0.0)
    dh, dh_error = _dh(problem, row, x_hat, x_hat_error, dy * _gain(problem, weight))
    if dresidual_out is not None:
        dh = dh + _float64(dresidual_out)
        dh_error = dh_error + unit * np.abs(dh)
    expected = {"dx": _expectation(dh, dh_error, problem.x_dtype)}
    if problem.residual_dtype:
        expected["dresidual"] = _expectation(dh, dh_error, problem.residual_dtype)
    summing = sum_error(max(1, problem.rows), unit) + 2 * unit
    if problem.weight_dtype:
        error = _over_rows(np.abs(dy) * x_hat_error) + _over_rows(np.abs(dy * x_hat)) * summing
        expected["dweight"] = _expectation(_over_rows(dy * x_hat), error, problem.weight_dtype)
    if problem.bias_dtype:
        error = _over_rows(np.abs(dy)) * summing
        expected["dbias"] = _expectation(_over_rows(dy), error, problem.bias_dtype)
    return expected


def worst(actual: Array, expected: Expectation) -> float:
    """Return the largest error in units of its bound: at most 1 for a right result, infinite for NaN where a number is due.

    Example:
        >>> import numpy as np
        >>> worst(np.array([1.5]), Expectation(np.array([1.0]), np.array([0.25])))
        2.0
    """
    if tuple(actual.shape) != expected.value.shape:
        return math.inf
    given = _float64(actual)
    with np.errstate(invalid="ignore"):
        error = np.abs(given - expected.value)
        within = (error <= expected.bound) | (np.isnan(given) & np.isnan(expected.value)) | (given == expected.value)
        ratio = error / expected.bound
    ratio = np.where(within, np.fmin(ratio, 1.0), np.where(np.isnan(ratio), math.inf, ratio))
    return float(np.max(ratio, initial=0.0))


@dataclass(frozen=True)
class _Statistics:
    """Exact centred h and rstd of each row, and bounds on the errors of the mean and (relative) of rstd as computed."""

    centred: FloatArray
    rstd: FloatArray
    mean_error: FloatArray
    rstd_error: FloatArray
    unit: float

    def x_hat_error(self, h_error: Any) -> FloatArray:
        """Bound on the error of (h - mean) rstd, from that of h."""
        subtracted = self.unit * np.abs(self.centred) * (self.mean_error > 0)
        x_hat: FloatArray = np.abs(self.centred * self.rstd)
        return self.rstd * (h_error + self.mean_error + subtracted) + _product(x_hat, self.rstd_error + self.unit)


def _product(value: FloatArray, relative: FloatArray) -> FloatArray:
    """Return the error of a value from a relative one, which may be infinite: that of 0 is 0 all the same."""
    shape = np.broadcast_shapes(value.shape, relative.shape)
    return np.multiply(value, relative, out=np.zeros(shape), where=value > 0)


def _statistics(problem: Problem, h: FloatArray, h_error: float) -> _Statistics:
    unit = UNIT_ROUNDOFF[problem.compute_dtype]
    summing = sum_error(problem.hidden_size, unit)
    mean = np.mean(h, axis=-1, keepdims=True) if problem.spec.subtract_mean else np.zeros((*h.shape[:-1], 1))
    mean_error = np.zeros_like(mean)
    if problem.spec.subtract_mean:
        mean_error = (h_error + summing + 2 * unit) * np.mean(np.abs(h), axis=-1, keepdims=True)
    centred = h - mean
    square = np.mean(centred * centred, axis=-1, keepdims=True)
    # the root mean square of the errors of the centred values, by which they move their own root mean square at most
    error = h_error * np.sqrt(np.mean(h * h, axis=-1, keepdims=True)) + mean_error + unit * np.sqrt(square)
    square_error = 2 * np.sqrt(square) * error + error * error + (summing + _SQUARES * unit) * square
    with np.errstate(divide="ignore", invalid="ignore"):
        rstd = 1 / np.sqrt(square + problem.spec.eps)
        relative = np.minimum(square_error / (square + problem.spec.eps), 1.0)
        rstd_error = 1 / np.sqrt(1 - relative) - 1 + _ROOT * unit
    return _Statistics(centred, rstd, mean_error, rstd_error, unit)


def _dh(
    problem: Problem, row: _Statistics, x_hat: FloatArray, x_hat_error: FloatArray, g: FloatArray
) -> tuple[FloatArray, FloatArray]:
    unit = row.unit
    summing = sum_error(problem.hidden_size, unit)
    share = np.mean(x_hat * g, axis=-1, keepdims=True)
    share_error = np.mean(x_hat_error * np.abs(g), axis=-1, keepdims=True)
    share_error += (summing + 4 * unit) * np.mean(np.abs(x_hat * g), axis=-1, keepdims=True)
    inner = g - x_hat * share
    error = 3 * unit * np.abs(g) + x_hat_error * np.abs(share) + np.abs(x_hat) * (share_error + 3 * unit * np.abs(share))
    if problem.spec.subtract_mean:
        mean = np.mean(g, axis=-1, keepdims=True)
        inner = inner - mean
        error = error + (summing + 3 * unit) * np.mean(np.abs(g), axis=-1, keepdims=True) + unit * np.abs(mean)
    dh = inner * row.rstd
    return dh, row.rstd * error + _product(np.abs(dh), row.rstd_error + unit)


def _expectation(value: FloatArray, error: FloatArray, dtype: str) -> Expectation:
    return Expectation(value, _SECOND_ORDER * _rounded(value, error, dtype))


def _rounded(value: FloatArray, error: FloatArray, dtype: str) -> FloatArray:
    """Bound on the error after rounding to a dtype; infinite where that may overflow."""
    bound = error + UNIT_ROUNDOFF[dtype] * (np.abs(value) + error) + UNDERFLOW[dtype]
    return np.where(np.abs(value) + bound >= float(ml_dtypes.finfo(dtype).max), math.inf, bound)


def _gain(problem: Problem, weight: Array | None) -> FloatArray:
    return np.ones(problem.hidden_size) if weight is None else problem.spec.weight_offset + _float64(weight)


def _over_rows(array: FloatArray) -> FloatArray:
    total: FloatArray = array.reshape(math.prod(array.shape[:-1]), array.shape[-1]).sum(axis=0)
    return total


def _float64(array: Array) -> FloatArray:
    return np.asarray(array).astype(np.float64)
