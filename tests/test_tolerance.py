# SPDX-License-Identifier: Apache-2.0
"""The bounds judge: every mutant must fail, the honest computation must pass, and both agree with the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normkit import reference
from normkit.interface import Wanted
from normkit.tolerance import Expectation, expected_backward, expected_forward, sum_error, worst

from . import mutants
from .cases import Case, NumpyArray, tagged

F32: dict[str, Any] = {"x": "float32", "residual": "float32", "weight": "float32", "bias": "float32"}
F16: dict[str, Any] = {"x": "float16", "residual": "float16", "weight": "float16", "bias": "float16"}
BF16: dict[str, Any] = {"x": "bfloat16", "residual": "bfloat16", "weight": "bfloat16", "bias": "bfloat16"}
JUDGED = tuple(
    Case(f"{kind}_{dtypes['x']}_{rounding}", kind, (5, hidden), **dtypes, rounding=rounding, weight_offset=0.5)
    for kind in ("rms", "layer")
    for dtypes, hidden in ((F32, 300), (BF16, 96), (F16, 96))
    for rounding in ("sum", "stored", "hf", None)
)
"""On each of these every mutant must be seen, but for those of SPECIAL."""

# Mutants that move y by less than one rounding of it on the cases above are judged where they matter.
SPECIAL = {
    "eps outside the root": Case("eps_matters", "rms", (5, 300), **F32, eps=1e-2),
    "no eps": Case("eps_matters", "rms", (5, 96), **BF16, eps=0.5),
    "eps doubled": Case("eps_matters", "rms", (5, 96), **BF16, eps=0.5),
    "eps lost in backward": Case("eps_matters", "rms", (5, 96), **BF16, eps=0.5),
    "unbiased variance": Case("short_rows", "layer", (5, 24), **BF16),
    "one-pass variance": Case("large_mean", "layer", (4, 4096), **F32, mean=1e4),
    "statistics in bfloat16": Case("fp32", "rms", (5, 300), **F32),
}


def _rejected(mutant: mutants.Mutant, case: Case) -> bool:
    problem, arrays = case.problem(), case.arrays()
    operands = {name: arrays[name] for name in ("x", "residual", "weight", "bias")}
    wrong = {mutant.step: mutant.wrong}
    if mutant.stage == "forward":
        actual = mutants.forward(problem, arrays, wrong)
        y, residual_out = expected_forward(problem, **operands, residual_out=actual["residual_out"])
        return worst(actual["y"], y) > 1 or worst(actual["residual_out"], residual_out) > 1
    h = mutants.forward(problem, arrays, {})["residual_out"]
    gradients = mutants.backward(problem, arrays, h, wrong)
    expected = expected_backward(problem, arrays["dy"], arrays["dresidual_out"], h, arrays["weight"])
    return any(worst(gradient, expected[name]) > 1 for name, gradient in gradients.items())


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_rejected(mutant: mutants.Mutant) -> None:
    cases = (SPECIAL[mutant.name],) if mutant.name in SPECIAL else JUDGED
    judged = [case for case in cases if mutant.differs(case.problem())]
    assert judged
    with np.errstate(all="ignore"):
        assert [case.name for case in judged if not _rejected(mutant, case)] == []


def test_there_are_enough_mutants() -> None:
    assert len({mutant.name for mutant in mutants.MUTANTS}) >= 20


@pytest.mark.parametrize("case", (*JUDGED, *SPECIAL.values()), ids=lambda case: case.name)
def test_the_honest_computation_is_accepted(case: Case) -> None:
    nothing = mutants.Mutant("nothing wrong", "forward", "shift", mutants.FORWARD["shift"], lambda problem: True)
    assert not _rejected(nothing, case)
    assert not _rejected(replace(nothing, stage="backward", step="dbias", wrong=mutants.BACKWARD["dbias"]), case)


@pytest.mark.parametrize("case", tagged("ci"), ids=lambda case: case.name)
def test_expected_values_are_the_reference_in_float64(case: Case) -> None:
    dtypes: dict[str, Any] = {name: "float64" for name in ("x", "residual", "weight", "bias") if getattr(case, name)}
    wide = replace(case, **dtypes, rounding="sum", residual_dtype=case.residual_dtype and "float64", out_dtype=None)
    problem = wide.problem(needs_grad=True)
    given = {name: _float64(array) for name, array in case.arrays().items()}
    operands = {name: given[name] for name in ("x", "residual", "weight", "bias")}
    y, residual_out, mean, rstd = reference.forward(problem, **operands)
    expected, h = expected_forward(problem, **operands)
    _close(y, expected)
    h_actual = given["x"] if residual_out is None else residual_out
    _close(h_actual, h)
    wanted = Wanted.by(problem)
    dresidual_out = given["dresidual_out"] if problem.residual_out_dtype else None
    gradients = reference.backward(problem, wanted, given["dy"], dresidual_out, h_actual, given["weight"], mean, rstd)
    for name, value in expected_backward(problem, given["dy"], dresidual_out, h_actual, given["weight"]).items():
        _close(dict(zip(("dx", "dresidual", "dweight", "dbias"), gradients.by_operand(problem), strict=True))[name], value)


def _float64(array: NumpyArray | None) -> NumpyArray | None:
    return None if array is None else array.astype(np.float64)


def _close(actual: Any, expected: Expectation) -> None:
    # both are rounded in float64, so each may be off by the bound
    assert worst(actual, replace(expected, bound=2 * expected.bound)) <= 1


def test_sum_error_grows_with_the_root() -> None:
    assert sum_error(400, 1.0) == 2 * sum_error(100, 1.0) == 40


def test_worst_sees_shapes_nan_and_infinities() -> None:
    expected = Expectation(np.array([1.0, np.inf, np.nan]), np.array([0.1, 0.1, 0.1]))
    assert worst(np.array([1.05, np.inf, np.nan]), expected) <= 1
    assert worst(np.array([np.nan, np.inf, np.nan]), expected) == np.inf
    assert worst(np.array([1.0, 5.0, np.nan]), expected) == np.inf
    assert worst(np.array([1.0, np.inf, 0.0]), expected) == np.inf
    assert worst(np.array([1.0]), expected) == np.inf
    overflowing = Expectation(np.array([7e4]), np.array([np.inf]))
    assert worst(np.array([np.inf]), overflowing) <= 1
    assert worst(np.array([np.nan]), overflowing) == np.inf
