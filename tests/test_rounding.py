# SPDX-License-Identifier: Apache-2.0
"""The rounding policies bit for bit: against the unfused computation, Hugging Face's own classes, and one scalar at a time."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest

from normkit.arrays import numpy_dtype

from .cases import NumpyArray
from .frameworks import Framework, installed, step_by_step

FRAMEWORKS = installed()
HALVES = ("bfloat16", "float16")
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])


def _ways() -> list[Any]:
    ways = [pytest.param(framework, False, id=framework.name) for framework in FRAMEWORKS.values()]
    return ways + ([pytest.param(FRAMEWORKS["jax"], True, id="jax-jit")] if "jax" in FRAMEWORKS else [])


EACH_WAY = pytest.mark.parametrize(("framework", "jit"), _ways())


def run(framework: Framework, jit: bool, function: str, *arrays: NumpyArray | None, **options: Any) -> list[NumpyArray]:
    """Call a function, compiled if asked; return its results as NumPy arrays."""

    def call(*given: Any) -> Any:
        return getattr(framework.front_end, function)(*given, **options)

    if jit:
        import jax

        call = jax.jit(call)
    with nullcontext() if jit else step_by_step(framework):
        result = call(*map(framework.array, arrays))
    return [np.asarray(framework.numpy(array)) for array in (result if isinstance(result, tuple) else (result,))]


def normal(shape: tuple[int, ...], dtype: str, seed: int = 0, scale: float = 1.0) -> NumpyArray:
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(numpy_dtype(dtype))


@EACH_WAY
@KINDS
@pytest.mark.parametrize(("x", "residual"), [*product(HALVES, HALVES), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_stored_is_the_unfused_computation(framework: Framework, jit: bool, kind: str, x: str, residual: str) -> None:
    rows = normal((16, 96), x), normal((16, 96), residual, seed=1)
    affine = normal((96,), x), normal((96,), x, seed=1)
    y, residual_out = run(framework, jit, f"add_{kind}_norm", *rows, *affine, rounding="stored")
    h = (rows[0].astype(np.float32) + rows[1].astype(np.float32)).astype(rows[1].dtype)
    np.testing.assert_array_equal(residual_out, h)
    (expected,) = run(framework, jit, f"{kind}_norm", h, *affine, out_dtype=x)
    np.testing.assert_array_equal(y, expected)
    (unrounded,) = run(framework, jit, f"add_{kind}_norm", *rows, *affine, rounding="sum", out_dtype="float32")[:1]
    (rounded,) = run(framework, jit, f"{kind}_norm", h, *affine, out_dtype="float32")
    assert np.any(unrounded != rounded) == (residual != "float32"), "the policies must be tellable apart"


@KINDS
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_stored_is_what_torch_adds_and_then_normalises(kind: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    framework = FRAMEWORKS["torch"]
    x, residual, weight = (
        framework.array(normal(shape, dtype, seed)) for seed, shape in enumerate([(64, 576), (64, 576), (576,)])
    )
    y, residual_out = getattr(framework.front_end, f"add_{kind}_norm")(x, residual, weight, rounding="stored")
    h = x + residual
    assert torch.equal(residual_out, h)
    assert torch.equal(y, getattr(framework.front_end, f"{kind}_norm")(h, weight))


@EACH_WAY
@KINDS
@pytest.mark.parametrize("dtype", HALVES)
def test_hf_rounds_before_the_weight(framework: Framework, jit: bool, kind: str, dtype: str) -> None:
    x, residual = normal((16, 96), dtype), normal((16, 96), dtype, seed=1)
    for weight_dtype in (dtype, "float32"):
        weight = normal((96,), weight_dtype)
        y, h = run(framework, jit, f"add_{kind}_norm", x, residual, weight, rounding="hf", out_dtype="float32")
        (x_hat,) = run(framework, jit, f"{kind}_norm", h)
        assert x_hat.dtype == numpy_dtype(dtype)
        np.testing.assert_array_equal(y, x_hat.astype(np.float32) * weight.astype(np.float32))


def _hugging_face(name: str) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    modules = {"LlamaRMSNorm": "llama", "GemmaRMSNorm": "gemma", "Qwen3RMSNorm": "qwen3"}
    module = getattr(transformers.models, modules[name])
    return torch, getattr(getattr(module, f"modeling_{modules[name]}"), name)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Qwen3RMSNorm"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_hf_is_hugging_faces_own_class(name: str, dtype: str, scale: float) -> None:
    torch, theirs = _hugging_face(name)
    framework = FRAMEWORKS["torch"]
    for hidden in (64, 576, 4096):
        x, residual = (framework.array(normal((32, hidden), dtype, seed, scale)) for seed in (0, 1))
        norm = theirs(hidden, eps=1e-6).to(x.dtype).to(x.device)
        with torch.no_grad():
            norm.weight.copy_(framework.array(normal((hidden,), dtype, 2)))
            expected = norm(x + residual)
            # of the implementations only the reference sums in torch's own order
            y, residual_out = framework.front_end.add_rms_norm(
                x, residual, norm.weight, eps=1e-6, rounding="hf", implementation="reference"
            )
        assert torch.equal(residual_out, x + residual)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_an_offset_of_one_is_gemma(dtype: str) -> None:
    torch, theirs = _hugging_face("GemmaRMSNorm")
    framework = FRAMEWORKS["torch"]
    x, weight = framework.array(normal((32, 2304), dtype)), framework.array(normal((2304,), dtype, 1, 0.1))
    norm = theirs(2304, eps=1e-6).to(x.dtype).to(x.device)
    with torch.no_grad():
        norm.weight.copy_(weight)
        # in torch's own order of sums
        own = framework.front_end.rms_norm(x, weight, eps=1e-6, weight_offset=1.0, implementation="reference")
        assert torch.equal(own, norm(x))


def _scalar(
    kind: str, rounding: str, row: list[tuple[Any, Any, Any, Any]], eps: float, offset: float
) -> tuple[list[Any], list[Any]]:
    """Normalise one row, an element at a time, rounding after each operation; its elements are (x, residual, weight, bias)."""
    one = np.float32
    h = [one(x) + one(residual) for x, residual, _, _ in row]
    stored = [value.astype(residual.dtype) for value, (_, residual, _, _) in zip(h, row, strict=True)]
    if rounding != "sum":
        h = [one(value) for value in stored]
    if kind == "layer":
        mean = sum(h[1:], h[0]) / one(len(h))
        h = [value - mean for value in h]
    squares = [value * value for value in h]
    rstd = one(1) / np.sqrt(sum(squares[1:], squares[0]) / one(len(h)) + one(eps))
    y = []
    for value, (x, _, weight, bias) in zip(h, row, strict=True):
        x_hat = value * rstd
        if rounding == "hf":
            x_hat = one(x_hat.astype(x.dtype))
        y.append((x_hat * (one(offset) + one(weight)) + one(bias)).astype(x.dtype))
    return y, stored


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
@KINDS
@pytest.mark.parametrize("rounding", ["sum", "stored", "hf"])
@pytest.mark.parametrize("hidden", [1, 2])
def test_one_scalar_at_a_time(framework: Framework, kind: str, rounding: str, hidden: int) -> None:
    """With one or two elements in a row there is one order of summation, and every operation's rounding is decided."""
    for x_dtype, residual_dtype, weight_dtype in product(("float32", *HALVES), repeat=3):
        rows = normal((40, hidden), x_dtype), normal((40, hidden), residual_dtype, 1)
        affine = normal((hidden,), weight_dtype, 2), normal((hidden,), weight_dtype, 3)
        options: dict[str, Any] = {"eps": 1e-5, "weight_offset": 1.0, "rounding": rounding}
        y, residual_out = run(framework, False, f"add_{kind}_norm", *rows, *affine, **options)
        for index in range(40):
            row = list(zip(rows[0][index], rows[1][index], *affine, strict=True))
            expected_y, expected_residual_out = _scalar(kind, rounding, row, 1e-5, 1.0)
            np.testing.assert_array_equal(residual_out[index], expected_residual_out)
            np.testing.assert_array_equal(y[index], expected_y)
