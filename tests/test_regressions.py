# SPDX-License-Identifier: Apache-2.0
"""Defects that other libraries have had: overwritten inputs, narrowed residuals, lost biases, overrun rows, empty input, ..."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normkit.arrays import numpy_dtype
from normkit.spec import NormSpec, Operand, describe

from .cases import Case, NumpyArray
from .frameworks import Framework, installed

FRAMEWORKS = installed()
EACH = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
ODD_SIZES = (1, 3, 5, 7, 13, 31, 33, 127, 129, 255, 257, 1001)


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> NumpyArray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(numpy_dtype(dtype))


def run(framework: Framework, function: str, *arrays: NumpyArray | None, **options: Any) -> tuple[NumpyArray, NumpyArray]:
    """Call a function with NumPy arrays; return y and residual_out as NumPy arrays, y twice if it returns nothing else."""
    result = getattr(framework.front_end, function)(*map(framework.array, arrays), **options)
    y, residual_out = result if isinstance(result, tuple) else (result, result)
    return _numpy(framework, y), _numpy(framework, residual_out)


def _numpy(framework: Framework, array: Any) -> NumpyArray:
    converted = framework.numpy(array)
    assert converted is not None
    return converted


def _memory(framework: Framework, array: Any) -> int:
    """Where an array's memory starts."""
    if framework.name == "numpy":
        return int(array.__array_interface__["data"][0])
    return int(array.untyped_storage().data_ptr() if framework.name == "torch" else array.unsafe_buffer_pointer())


@EACH
@KINDS
@pytest.mark.parametrize("gradient", [False, True])
def test_outputs_have_memory_of_their_own_and_inputs_keep_their_values(framework: Framework, kind: str, gradient: bool) -> None:
    for dtype in ("float32", "bfloat16", "float64"):
        if dtype == "float64" and framework.name == "jax":
            continue
        given = [normal(shape, dtype, seed) for seed, shape in enumerate([(3, 8), (3, 8), (8,), (8,)])]
        for without_residual, affine in ((True, True), (False, True), (True, False), (False, False)):
            arrays = [framework.array(array.copy()) for array in given]
            if gradient and framework.name == "torch":
                arrays = [array.requires_grad_() for array in arrays]
            residual = None if without_residual else arrays[1]
            operands = [arrays[0], residual, *(arrays[2:] if affine else ())]
            y, residual_out = getattr(framework.front_end, f"add_{kind}_norm")(*operands)
            places = {_memory(framework, array) for array in (*arrays, y)}
            assert len(places) == 5
            assert residual_out is arrays[0] if without_residual else _memory(framework, residual_out) not in places
            for array, expected in zip(arrays, given, strict=True):
                np.testing.assert_array_equal(_numpy(framework, array), expected)


@EACH
@KINDS
def test_a_residual_of_zeros_is_still_added_into_new_memory(framework: Framework, kind: str) -> None:
    x, zeros = (framework.array(array) for array in (normal((3, 8)), np.zeros((3, 8), np.float32)))
    _, residual_out = getattr(framework.front_end, f"add_{kind}_norm")(x, zeros)
    assert residual_out is not x
    assert _memory(framework, residual_out) not in (_memory(framework, x), _memory(framework, zeros))


@EACH
@KINDS
@pytest.mark.parametrize("rounding", [None, "sum", "stored", "hf"])
def test_a_float32_residual_is_never_narrowed(framework: Framework, kind: str, rounding: str | None) -> None:
    stream = normal((4, 96))
    for layer in range(3):
        branch = normal((4, 96), "bfloat16", seed=layer + 1)
        y, residual_out = run(framework, f"add_{kind}_norm", branch, stream, rounding=rounding)
        assert (y.dtype, residual_out.dtype) == (numpy_dtype("bfloat16"), np.float32)
        stream = branch.astype(np.float32) + stream
        np.testing.assert_array_equal(residual_out, stream)


@EACH
@KINDS
def test_a_narrow_residual_is_not_widened_unless_asked(framework: Framework, kind: str) -> None:
    x, residual = normal((4, 96)), normal((4, 96), "float16", seed=1)
    _, residual_out = run(framework, f"add_{kind}_norm", x, residual)
    np.testing.assert_array_equal(residual_out, (x + residual.astype(np.float32)).astype(np.float16))
    assert residual_out.dtype == np.float16
    _, residual_out = run(framework, f"add_{kind}_norm", x, residual, residual_dtype="float32")
    np.testing.assert_array_equal(residual_out, x + residual.astype(np.float32))


@EACH
@KINDS
@pytest.mark.parametrize("adds", ["", "add_"])
@pytest.mark.parametrize("hidden", [1, 5, 1000, 40000])
def test_the_bias_is_never_dropped(framework: Framework, kind: str, adds: str, hidden: int) -> None:
    zeros, weight, bias = np.zeros((2, hidden), np.float32), normal((hidden,)), normal((hidden,), seed=1)
    for weights in (weight, None):
        for rounding in (None, "stored", "hf"):
            rows = (zeros, zeros) if adds else (zeros,)
            y, _ = run(framework, f"{adds}{kind}_norm", *rows, weights, bias, rounding=rounding)
            np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


@EACH
@KINDS
@pytest.mark.parametrize("hidden", ODD_SIZES)
def test_odd_rows_take_nothing_from_their_neighbours(framework: Framework, kind: str, hidden: int) -> None:
    if framework.name == "jax":
        return  # its arrays are no views
    padded = np.full((5, hidden + 3), np.nan, np.float32)
    padded[1:4, 1 : hidden + 1] = normal((3, hidden))
    view = framework.array(padded)[1:4, 1 : hidden + 1]
    function = getattr(framework.front_end, f"add_{kind}_norm")
    dense = framework.array(padded[1:4, 1 : hidden + 1].copy())
    for result, expected in zip(function(view, view), function(dense, dense), strict=True):
        assert np.isfinite(_numpy(framework, result)).all()
        np.testing.assert_array_equal(_numpy(framework, result), _numpy(framework, expected))


@KINDS
@pytest.mark.parametrize("hidden", ODD_SIZES)
def test_in_place_odd_rows_leave_their_neighbours_alone(kind: str, hidden: int) -> None:
    if "torch" not in FRAMEWORKS:
        pytest.skip("torch is not installed")
    framework = FRAMEWORKS["torch"]
    buffers = [framework.array(normal((5, hidden + 3), seed=seed)) for seed in (0, 1)]
    before = [buffer.clone() for buffer in buffers]
    inside = (slice(1, 4), slice(1, hidden + 1))
    expected = getattr(framework.front_end, f"add_{kind}_norm")(*(buffer[inside] for buffer in before))
    getattr(framework.front_end, f"add_{kind}_norm_")(*(buffer[inside] for buffer in buffers))
    for buffer, old, result in zip(buffers, before, expected, strict=True):
        old[inside] = result
        np.testing.assert_array_equal(_numpy(framework, buffer), _numpy(framework, old))


@EACH
@KINDS
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 0, 1), (0, 40000)])
def test_no_rows_at_all(framework: Framework, kind: str, shape: tuple[int, ...]) -> None:
    for residual in (None, "float32", "bfloat16"):
        case = Case("empty", kind, shape, x="float32", residual=residual, weight="float32", bias="float32")
        arrays = {name: framework.array(array) for name, array in case.arrays().items()}
        y, _ = framework.call(case, arrays, None)
        assert _numpy(framework, y).shape == shape
        _, gradients = framework.gradients(case, arrays, "reference")
        for name in ("weight", "bias"):
            np.testing.assert_array_equal(_numpy(framework, gradients[name]), np.zeros(shape[-1:], np.float32))
        for name in ("x", "residual") if residual else ("x",):
            assert _numpy(framework, gradients[name]).shape == shape


@EACH
@pytest.mark.parametrize("mean", [1e4, 2.0**20, -(2.0**22)])
@pytest.mark.parametrize("hidden", [2, 64, 4096])
def test_variance_is_that_of_the_centred_values(framework: Framework, mean: float, hidden: int) -> None:
    deviations = np.tile(np.array([1.0, -1.0], np.float32), hidden // 2)
    x = np.stack([mean + deviations, deviations]).astype(np.float32)
    y, _ = run(framework, "layer_norm", x, eps=0.0)
    np.testing.assert_allclose(y, np.broadcast_to(deviations, y.shape), rtol=2.0**-22)
    y, residual_out = run(
        framework, "add_layer_norm", np.broadcast_to(np.float32(mean), x.shape), x - np.float32(mean), eps=0.0
    )
    np.testing.assert_array_equal(residual_out, x)
    np.testing.assert_allclose(y, np.broadcast_to(deviations, y.shape), rtol=2.0**-22)


@EACH
@KINDS
@pytest.mark.parametrize("hidden", [1, 3, 1000, 4097])
def test_variance_is_never_negative(framework: Framework, kind: str, hidden: int) -> None:
    values = np.array([0.0, 0.1, -3.3, 1e4 + 0.1, 16777215.0, 3.3e7, -1e16, 1e-30], np.float32)
    x, eps = np.repeat(values[:, None], hidden, axis=1), 1e-6
    problem = describe(NormSpec(kind, eps=eps), Operand(x.shape, "float32"), needs_grad=True)
    entry = next(entry for entry in framework.table if entry.name == "reference")
    y, _, _, rstd = (
        None if array is None else framework.numpy(array)
        for array in entry.load().forward(problem, framework.array(x), None, None, None)
    )
    assert y is not None and rstd is not None
    assert np.isfinite(y).all()
    assert (rstd > 0).all() and (rstd <= 1e3 * (1 + 2.0**-20)).all()
    if kind == "layer":
        np.testing.assert_array_equal(y[0], 0.0)


@EACH
@KINDS
def test_half_precision_does_not_overflow_inside(framework: Framework, kind: str) -> None:
    x = np.tile(np.array([60000.0, -60000.0], np.float16), (2, 50))
    y, residual_out = run(framework, f"add_{kind}_norm", x, x, rounding="sum")
    assert np.isinf(residual_out).all(), "twice 60000 is none of float16's numbers"
    np.testing.assert_array_equal(y, np.sign(x))
    y, residual_out = run(framework, f"add_{kind}_norm", x, x, residual_dtype="float32", rounding="stored")
    np.testing.assert_array_equal(residual_out, 2 * x.astype(np.float32))
    np.testing.assert_array_equal(y, np.sign(x))


@EACH
@KINDS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["x", "residual"])
def test_nan_and_infinity_stay_in_their_row(framework: Framework, kind: str, value: float, operand: str) -> None:
    case = Case("finite", kind, (5, 40), x="float32", residual="float32", weight="float32", bias="float32")
    given = case.arrays()
    results = []
    for bad in (False, True):
        arrays = {name: None if array is None else array.copy() for name, array in given.items()}
        array = arrays[operand]
        assert array is not None
        if bad:
            array[2, 7] = value
        converted = {name: framework.array(array) for name, array in arrays.items()}
        y, residual_out = framework.call(case, converted, None)
        results.append([_numpy(framework, y), _numpy(framework, residual_out)])
        if framework.name != "numpy":
            _, gradients = framework.gradients(case, converted, "reference")
            results[-1] += [_numpy(framework, gradients[name]) for name in ("x", "residual")]
    others = [0, 1, 3, 4]
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(dirty[others], clean[others])
    y, residual_out = results[1][:2]
    assert np.isnan(y[2, 7]) and np.isfinite(np.delete(residual_out[2], 7)).all()
    if kind == "layer" or np.isnan(value):
        assert np.isnan(y[2]).all()
    else:
        np.testing.assert_array_equal(np.delete(y[2] - given["bias"], 7), 0.0)


@EACH
@KINDS
def test_backward_overwrites_nothing(framework: Framework, kind: str) -> None:
    case = Case("unchanged", kind, (5, 40), bias="bfloat16")
    given = case.arrays()
    arrays = {name: framework.array(array) for name, array in given.items()}
    for _ in range(2):
        framework.gradients(case, arrays, "reference")
    for name, array in given.items():
        np.testing.assert_array_equal(_numpy(framework, arrays[name]), array)


@EACH
@KINDS
@pytest.mark.parametrize("rounding", [None, "sum", "stored", "hf"])
def test_the_gradient_of_a_nearly_constant_row_is_bounded(framework: Framework, kind: str, rounding: str | None) -> None:
    """Backward projects and multiplies by rstd: dx is at most dy / sqrt(eps) long, however h was rounded."""
    x, residual = (np.full((1, 4096), value).astype(numpy_dtype("bfloat16")) for value in (100.0, 0.2))
    case = Case("constant", kind, x.shape, weight=None, rounding=rounding)
    dy = normal(x.shape, "bfloat16")
    arrays = {"x": x, "residual": residual, "weight": None, "bias": None, "dy": dy, "dresidual_out": np.zeros_like(x)}
    _, gradients = framework.gradients(case, {name: framework.array(array) for name, array in arrays.items()}, "reference")
    length = np.linalg.norm(_numpy(framework, gradients["x"]).astype(np.float64))
    assert length <= 1.01 * np.linalg.norm(dy.astype(np.float64)) / np.sqrt(case.eps)
