# SPDX-License-Identifier: Apache-2.0
"""Wrong norms: each computes one thing wrongly in float32 and rounds as it should. The derived bounds must reject them all.

A mutant is the right computation in small steps with one step replaced, so that nothing but that step is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit.arrays import numpy_dtype
from normkit.spec import Problem

NumpyArray = np.ndarray[Any, Any]
Step = Callable[..., Any]
Row = tuple[str, str, Step, Callable[[Problem], bool]]


def _round(array: NumpyArray, dtype: str) -> NumpyArray:
    return array.astype(numpy_dtype(dtype)).astype(np.float32)


def _mean(problem: Problem, h: NumpyArray) -> NumpyArray:
    return h.mean(-1, keepdims=True) if problem.spec.subtract_mean else np.zeros_like(h[..., :1])


def _variance(problem: Problem, h: NumpyArray, mean: NumpyArray) -> NumpyArray:
    return np.square(h - mean).mean(-1, keepdims=True)


def _rstd(problem: Problem, variance: NumpyArray) -> NumpyArray:
    return 1 / np.sqrt(variance + np.float32(problem.spec.eps))


def _over_rows(array: NumpyArray) -> NumpyArray:
    return array.reshape(-1, array.shape[-1]).sum(0)


FORWARD: dict[str, Step] = {
    "h": lambda problem, x, residual: x if residual is None else x + residual,
    "residual_out": lambda problem, h, x, residual: h,
    "normalised": lambda problem, h, stored: stored if problem.spec.rounding in ("stored", "hf") else h,
    "mean": _mean,
    "variance": _variance,
    "rstd": _rstd,
    "x_hat": lambda problem, h, mean, rstd: (h - mean) * rstd,
    "gain": lambda problem, weight: problem.spec.weight_offset + weight,
    "shift": lambda problem, bias: bias,
    "y": lambda problem, x_hat, gain, shift: x_hat * gain + shift,
}

BACKWARD: dict[str, Step] = {
    "mean": _mean,
    "variance": _variance,
    "rstd": _rstd,
    "x_hat": lambda problem, h, mean, rstd: (h - mean) * rstd,
    "g": lambda problem, dy, weight: dy * (problem.spec.weight_offset + weight),
    "projection": lambda problem, x_hat, g: x_hat * (x_hat * g).mean(-1, keepdims=True),
    "centring": lambda problem, g: g.mean(-1, keepdims=True) if problem.spec.subtract_mean else np.float32(0),
    "dh": lambda problem, rstd, g, projection, centring: rstd * (g - projection - centring),
    "through_residual": lambda problem, dh, dresidual_out: dh + dresidual_out,
    "dresidual": lambda problem, dh, dh_total: dh_total,
    "dweight": lambda problem, dy, x_hat, h: _over_rows(dy * x_hat),
    "dbias": lambda problem, dy: _over_rows(dy),
}


def forward(problem: Problem, arrays: Mapping[str, NumpyArray | None], wrong: Mapping[str, Step]) -> dict[str, NumpyArray]:
    """Compute y and residual_out with some steps replaced."""
    step = FORWARD | dict(wrong)
    x, residual, weight, bias = (_float32(arrays[name]) for name in ("x", "residual", "weight", "bias"))
    assert x is not None
    h = step["h"](problem, x, residual)
    stored = _round(step["residual_out"](problem, h, x, residual), problem.h_dtype)
    h = step["normalised"](problem, h, stored)
    mean = step["mean"](problem, h)
    rstd = step["rstd"](problem, step["variance"](problem, h, mean))
    x_hat = step["x_hat"](problem, h, mean, rstd)
    if problem.spec.rounding == "hf":
        x_hat = _round(x_hat, problem.x_dtype)
    gain = np.float32(1) if weight is None else step["gain"](problem, weight)
    shift = np.float32(0) if bias is None else step["shift"](problem, bias)
    y = step["y"](problem, x_hat, gain, shift)
    return {"y": y.astype(numpy_dtype(problem.out_dtype)), "residual_out": stored.astype(numpy_dtype(problem.h_dtype))}


def backward(
    problem: Problem, arrays: Mapping[str, NumpyArray | None], h: NumpyArray, wrong: Mapping[str, Step]
) -> dict[str, NumpyArray]:
    """Compute dx, dresidual, dweight and dbias with some steps replaced."""
    step = BACKWARD | dict(wrong)
    dy, dresidual_out, weight = (_float32(arrays[name]) for name in ("dy", "dresidual_out", "weight"))
    assert dy is not None
    h = h.astype(np.float32)
    mean = step["mean"](problem, h)
    rstd = step["rstd"](problem, step["variance"](problem, h, mean))
    x_hat = step["x_hat"](problem, h, mean, rstd)
    g = dy if weight is None else step["g"](problem, dy, weight)
    dh = step["dh"](problem, rstd, g, step["projection"](problem, x_hat, g), step["centring"](problem, g))
    total = dh if dresidual_out is None else step["through_residual"](problem, dh, dresidual_out)
    results = {"dx": (total, problem.x_dtype), "dresidual": (step["dresidual"](problem, dh, total), problem.residual_dtype)}
    results["dweight"] = (step["dweight"](problem, dy, x_hat, h), problem.weight_dtype)
    results["dbias"] = (step["dbias"](problem, dy), problem.bias_dtype)
    return {name: array.astype(numpy_dtype(dtype)) for name, (array, dtype) in results.items() if dtype}


def _float32(array: NumpyArray | None) -> NumpyArray | None:
    return None if array is None else array.astype(np.float32)


@dataclass(frozen=True)
class Mutant:
    """One wrong norm: the step it replaces, by what, and the problems on which that makes a difference."""

    name: str
    stage: str
    step: str
    wrong: Step
    differs: Callable[[Problem], bool]


def _any(problem: Problem) -> bool:
    return True


def _layer(problem: Problem) -> bool:
    return problem.spec.subtract_mean


def _rms(problem: Problem) -> bool:
    return not problem.spec.subtract_mean


def _adds(problem: Problem) -> bool:
    return problem.residual_dtype is not None


def _streams(problem: Problem) -> bool:
    return problem.residual_out_dtype is not None


def _weighted(problem: Problem) -> bool:
    return problem.weight_dtype is not None


def _offset(problem: Problem) -> bool:
    return problem.spec.weight_offset != 0 and problem.weight_dtype is not None


def _biased(problem: Problem) -> bool:
    return problem.bias_dtype is not None


def _many_rows(problem: Problem) -> bool:
    return problem.rows > 1


def _last_element_forgotten(problem: Problem, h: NumpyArray, mean: NumpyArray, rstd: NumpyArray) -> NumpyArray:
    return np.concatenate([((h - mean) * rstd)[..., :-1], h[..., -1:]], axis=-1)


FORWARD_MUTANTS: tuple[Row, ...] = (
    ("eps outside the root", "rstd", lambda p, v: 1 / (np.sqrt(v) + np.float32(p.spec.eps)), _any),
    ("no eps", "rstd", lambda p, v: 1 / np.sqrt(v), _any),
    ("eps doubled", "rstd", lambda p, v: 1 / np.sqrt(v + np.float32(2 * p.spec.eps)), _any),
    ("root missing", "rstd", lambda p, v: 1 / (v + np.float32(p.spec.eps)), _any),
    ("rows swapped", "rstd", lambda p, v: np.roll(_rstd(p, v), 1, axis=0), _many_rows),
    ("LayerNorm for RMSNorm", "mean", lambda p, h: h.mean(-1, keepdims=True), _rms),
    ("RMSNorm for LayerNorm", "mean", lambda p, h: np.zeros_like(h[..., :1]), _layer),
    ("mean kept", "x_hat", lambda p, h, mean, rstd: h * rstd, _layer),
    ("last element forgotten", "x_hat", _last_element_forgotten, _any),
    ("unbiased variance", "variance", lambda p, h, m: _variance(p, h, m) * h.shape[-1] / (h.shape[-1] - 1), _any),
    ("one-pass variance", "variance", lambda p, h, m: np.abs(_variance(p, h, 0 * m) - np.square(m)), _layer),
    ("statistics in bfloat16", "variance", lambda p, h, m: _round(_variance(p, h, m), "bfloat16"), _any),
    ("statistics of half the row", "variance", lambda p, h, m: _variance(p, h[..., ::2], m), _any),
    ("sum of squares not divided", "variance", lambda p, h, m: _variance(p, h, m) * h.shape[-1], _any),
    ("offset lost", "gain", lambda p, w: w, _offset),
    ("offset added twice", "gain", lambda p, w: w + 2 * p.spec.weight_offset, _offset),
    ("weight lost", "gain", lambda p, w: np.float32(1), _weighted),
    ("bias lost", "shift", lambda p, b: np.float32(0), _biased),
    ("2 % too large", "y", lambda p, x_hat, gain, shift: np.float32(1.02) * (x_hat * gain + shift), _any),
    ("residual subtracted", "h", lambda p, x, r: x - r, _adds),
    ("residual lost", "h", lambda p, x, r: x, _adds),
    ("residual_out without x", "residual_out", lambda p, h, x, r: r, _adds),
)

BACKWARD_MUTANTS: tuple[Row, ...] = (
    ("dx without projection", "projection", lambda p, x_hat, g: 0 * x_hat, _any),
    ("dx without centring", "centring", lambda p, g: np.float32(0), _layer),
    ("dx centred for RMSNorm", "centring", lambda p, g: g.mean(-1, keepdims=True), _rms),
    ("dx not scaled by rstd", "dh", lambda p, rstd, g, projection, centring: g - projection - centring, _any),
    ("dy not weighted", "g", lambda p, dy, w: dy, _weighted),
    ("offset lost in backward", "g", lambda p, dy, w: dy * w, _offset),
    ("eps lost in backward", "rstd", lambda p, v: 1 / np.sqrt(v), _any),
    ("residual gradient lost", "through_residual", lambda p, dh, d: dh, _streams),
    ("residual gradient doubled", "through_residual", lambda p, dh, d: dh + 2 * d, _streams),
    ("dresidual without that of residual_out", "dresidual", lambda p, dh, total: dh, _adds),
    ("dweight from h", "dweight", lambda p, dy, x_hat, h: _over_rows(dy * h), _weighted),
    ("dweight averaged", "dweight", lambda p, dy, x_hat, h: _over_rows(dy * x_hat) / p.rows, _weighted),
    ("dweight without a row", "dweight", lambda p, dy, x_hat, h: _over_rows((dy * x_hat)[1:]), _weighted),
    ("dbias lost", "dbias", lambda p, dy: np.zeros(dy.shape[-1], np.float32), _biased),
)

MUTANTS = tuple(Mutant(name, "forward", step, wrong, differs) for name, step, wrong, differs in FORWARD_MUTANTS) + tuple(
    Mutant(name, "backward", step, wrong, differs) for name, step, wrong, differs in BACKWARD_MUTANTS
)
