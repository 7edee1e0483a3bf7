# SPDX-License-Identifier: Apache-2.0
"""What holds for any input: symmetries of the norms, gradients by finite differences, and the bounds on random problems."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from normkit import reference
from normkit.arrays import FLOAT_DTYPES, numpy_dtype
from normkit.interface import Wanted
from normkit.spec import NormSpec, Operand, describe
from normkit.tolerance import UNIT_ROUNDOFF, expected_backward, expected_forward, worst

from .cases import Case, NumpyArray
from .frameworks import Framework, installed

FRAMEWORKS = installed()
EACH = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
# the first call of a shape compiles in JAX
RANDOM = settings(
    derandomize=True, deadline=None, max_examples=15, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.sampled_from([1, 3])
HIDDEN = st.sampled_from([1, 2, 31, 100])


def normal(seed: int, *shape: int, dtype: str = "float32") -> NumpyArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype))


def run(framework: Framework, function: str, *arrays: NumpyArray | None, **options: Any) -> list[NumpyArray]:
    """Call a function with NumPy arrays; return its results as NumPy arrays."""
    result = getattr(framework.front_end, function)(*map(framework.array, arrays), **options)
    return [np.asarray(framework.numpy(array)) for array in (result if isinstance(result, tuple) else (result,))]


@EACH
@KINDS
@RANDOM
@given(seed=SEEDS, rows=ROWS, hidden=HIDDEN, power=st.integers(-12, 12), negative=st.booleans())
def test_a_power_of_two_as_scale_changes_no_bit(
    framework: Framework, kind: str, seed: int, rows: int, hidden: int, power: int, negative: bool
) -> None:
    if hidden == 1 and kind == "layer":
        return  # 0 / 0
    x, weight, scale = normal(seed, rows, hidden), normal(seed, hidden), (-1.0 if negative else 1.0) * 2.0**power
    (y,) = run(framework, f"{kind}_norm", x, weight, eps=0.0)
    (scaled,) = run(framework, f"{kind}_norm", (x * scale).astype(np.float32), weight, eps=0.0)
    np.testing.assert_array_equal(scaled, -y if negative else y)


@EACH
@KINDS
@RANDOM
@given(seed=SEEDS, hidden=HIDDEN)
def test_permuted_rows_give_permuted_rows(framework: Framework, kind: str, seed: int, hidden: int) -> None:
    x, residual, weight, bias = (
        normal(seed, 7, hidden),
        normal(seed + 1, 7, hidden),
        normal(seed, hidden),
        normal(seed + 1, hidden),
    )
    order = np.random.default_rng(seed).permutation(7)
    results = run(framework, f"add_{kind}_norm", x, residual, weight, bias)
    permuted = run(framework, f"add_{kind}_norm", x[order], residual[order], weight, bias)
    problem = Case("", kind, x.shape, x="float32", residual="float32", weight="float32", bias="float32").problem()
    np.testing.assert_array_equal(permuted[1], results[1][order])
    expected, _ = expected_forward(problem, x[order], residual[order], weight, bias)
    assert np.all(np.abs(permuted[0].astype(np.float64) - results[0][order]) <= 2 * expected.bound)


@EACH
@KINDS
@RANDOM
@given(seed=SEEDS, rows=ROWS, hidden=HIDDEN, dtype=st.sampled_from(FLOAT_DTYPES[:3]))
def test_no_weight_is_a_weight_of_ones(framework: Framework, kind: str, seed: int, rows: int, hidden: int, dtype: str) -> None:
    x, residual = normal(seed, rows, hidden, dtype=dtype), normal(seed + 1, rows, hidden, dtype=dtype)
    ones, zeros = np.ones(hidden, numpy_dtype(dtype)), np.zeros(hidden, numpy_dtype(dtype))
    without = run(framework, f"add_{kind}_norm", x, residual)
    for affine in ((ones, None), (ones, zeros), (None, zeros)):
        for result, expected in zip(run(framework, f"add_{kind}_norm", x, residual, *affine), without, strict=True):
            np.testing.assert_array_equal(result, expected)
    with_offset = run(framework, f"add_{kind}_norm", x, residual, zeros, weight_offset=1.0)
    np.testing.assert_array_equal(with_offset[0], without[0])


@EACH
@RANDOM
@given(seed=SEEDS, rows=ROWS, hidden=st.sampled_from([2, 31, 100]), shift=st.floats(-1e3, 1e3, width=32))
def test_layer_norm_does_not_see_a_shift(framework: Framework, seed: int, rows: int, hidden: int, shift: float) -> None:
    x = normal(seed, rows, hidden)
    shifted = x + np.float32(shift)
    problem = Case("", "layer", x.shape, x="float32", residual=None, weight=None, eps=1e-3).problem()
    (y,) = run(framework, "layer_norm", shifted, eps=1e-3)
    exact, _ = expected_forward(problem, x.astype(np.float64))
    bound, _ = expected_forward(problem, shifted)
    # the shifted input was rounded: each element moved by at most u |x + shift|, and through the mean and the deviation,
    # whose derivatives are at most 1 and |x_hat|, each result by as much times rstd
    moved = UNIT_ROUNDOFF["float32"] * np.abs(shifted).max(-1, keepdims=True) * (2 + np.abs(exact.value))
    rstd = 1 / np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + 1e-3)
    slack = moved * rstd
    assert np.all(np.abs(y - exact.value) <= (bound.bound + slack) * (1 + slack.max()))


@EACH
@KINDS
@RANDOM
@given(seed=SEEDS, rows=ROWS, hidden=st.sampled_from([2, 31, 100]))
def test_dx_is_orthogonal_to_x_hat(framework: Framework, kind: str, seed: int, rows: int, hidden: int) -> None:
    """A norm with eps = 0 does not see the scale of a row, so dx has no part along it; nor, in LayerNorm, along ones."""
    if framework.name == "numpy":
        return
    case = Case("", kind, (rows, hidden), x="float32", residual="float32", weight="float32", eps=0.0)
    rng = np.random.default_rng(seed)
    x = np.where(np.arange(hidden) % 2, 1.0, -1.0) * rng.uniform(1.0, 2.0, (rows, hidden))
    given: dict[str, NumpyArray | None] = {
        "x": x,
        "residual": np.zeros_like(x),
        "weight": rng.standard_normal(hidden),
        "dy": rng.standard_normal(x.shape),
    }
    given |= {"bias": None, "dresidual_out": np.zeros_like(x)}
    arrays = {name: None if array is None else array.astype(np.float32) for name, array in given.items()}
    _, gradients = framework.gradients(case, {name: framework.array(array) for name, array in arrays.items()}, "reference")
    dx = np.asarray(framework.numpy(gradients["x"])).astype(np.float64)
    expected = expected_backward(case.problem(), arrays["dy"], None, arrays["x"], arrays["weight"])["dx"]
    h = np.asarray(arrays["x"]).astype(np.float64)
    centred = h - (h.mean(-1, keepdims=True) if kind == "layer" else 0.0)
    for direction in (centred, np.ones_like(h)) if kind == "layer" else (centred,):
        assert np.all(np.abs((dx * direction).sum(-1)) <= (expected.bound * np.abs(direction)).sum(-1) + 1e-12)


@KINDS
@RANDOM
@given(seed=SEEDS, hidden=st.sampled_from([1, 2, 5, 16]), offset=st.sampled_from([0.0, 1.0]))
def test_the_reference_backward_by_finite_differences(kind: str, seed: int, hidden: int, offset: float) -> None:
    spec = NormSpec(kind, eps=1e-2, weight_offset=offset)
    rows, affine = Operand((3, hidden), "float64"), Operand((hidden,), "float64")
    problem = describe(spec, rows, rows, affine, affine, needs_grad=True)
    arrays = [normal(seed + index, *shape, dtype="float64") for index, shape in enumerate([(3, hidden)] * 2 + [(hidden,)] * 2)]
    dy, dresidual_out = normal(seed + 4, 3, hidden, dtype="float64"), normal(seed + 5, 3, hidden, dtype="float64")

    def loss(*given: NumpyArray) -> float:
        y, residual_out, _, _ = reference.forward(problem, *given)
        return float((y * dy).sum() + (residual_out * dresidual_out).sum())

    _, h, mean, rstd = reference.forward(problem, *arrays)
    found = reference.backward(problem, Wanted.by(problem), dy, dresidual_out, h, arrays[2], mean, rstd)
    step = 1e-5
    for index, gradient in enumerate(found.by_operand(problem)):
        assert gradient is not None
        numeric = np.empty_like(arrays[index])
        for place in np.ndindex(numeric.shape):
            sides = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[index][place] += sign * step
                sides.append(loss(*moved))
            numeric[place] = (sides[0] - sides[1]) / (2 * step)
        # a step of 1e-5 leaves a third-order term of about step^2 / eps^1.5 and a rounding error of about u / step
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-6)


@EACH
@KINDS
@RANDOM
@given(
    seed=SEEDS,
    rows=ROWS,
    hidden=HIDDEN,
    dtype=st.sampled_from(FLOAT_DTYPES[:3]),
    rounding=st.sampled_from([None, "stored", "hf"]),
)
def test_x_and_residual_may_change_places(
    framework: Framework, kind: str, seed: int, rows: int, hidden: int, dtype: str, rounding: str | None
) -> None:
    x, residual, weight = (normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate([(rows, hidden)] * 2 + [(hidden,)]))
    one = run(framework, f"add_{kind}_norm", x, residual, weight, rounding=rounding)
    other = run(framework, f"add_{kind}_norm", residual, x, weight, rounding=rounding)
    for result, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(result, expected)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Any shape, dtypes and options; float64 aside, which JAX has only by a global setting."""
    dtypes = st.sampled_from(FLOAT_DTYPES[:3])
    # few shapes, as JAX compiles for each
    leading = draw(st.sampled_from([(), (0,), (3,), (2, 1, 3)]))
    shape = (*leading, draw(st.sampled_from([1, 2, 33, 300])))
    weight = draw(st.none() | dtypes)
    return Case(
        f"random {draw(SEEDS)}",
        draw(st.sampled_from(["rms", "layer"])),
        shape,
        x=draw(dtypes),
        residual=draw(st.none() | dtypes),
        weight=weight,
        bias=draw(st.none() | dtypes),
        eps=draw(st.sampled_from([1e-12, 1e-6, 1e-5, 1.0])),
        weight_offset=draw(st.sampled_from([0.0, 1.0, -0.5])) if weight else 0.0,
        rounding=draw(st.sampled_from([None, "sum", "stored", "hf"])),
        residual_dtype=draw(st.none() | dtypes),
        out_dtype=draw(st.none() | dtypes),
        mean=draw(st.sampled_from([0.0, 0.0, 3.0])),
        scale=draw(st.sampled_from([1.0, 1e-2, 10.0])),
    )


@EACH
@settings(RANDOM, max_examples=40)
@given(case=problems())
@example(
    case=Case(
        "one value, far from the bounds' first order", "layer", (1,), "float32", None, eps=1e-12, residual_dtype="bfloat16"
    )
)
def test_random_problems_are_within_the_bounds(framework: Framework, case: Case) -> None:
    given = case.arrays()
    arrays = {name: framework.array(array) for name, array in given.items()}
    y, residual_out = (framework.numpy(array) for array in framework.call(case, arrays, None))
    computed = residual_out if case.problem().residual_out_dtype else None
    operands = {name: given[name] for name in ("x", "residual", "weight", "bias")}
    expected_y, expected_residual_out = expected_forward(case.problem(), **operands, residual_out=computed)
    assert y is not None and worst(y, expected_y) <= 1
    if computed is not None:
        assert worst(computed, expected_residual_out) <= 1
    residual_out, gradients = framework.gradients(case, arrays, "reference")
    h = given["x"] if residual_out is None else framework.numpy(residual_out)
    expected = expected_backward(case.problem(), given["dy"], given["dresidual_out"], h, given["weight"])
    for name, bound in expected.items():
        assert worst(np.asarray(framework.numpy(gradients[name[1:]])), bound) <= 1, name
