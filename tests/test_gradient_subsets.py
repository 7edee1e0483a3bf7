# SPDX-License-Identifier: Apache-2.0
"""Gradients for every subset of the inputs that asks, through each result and both, with a residual and without one."""

from __future__ import annotations

from functools import partial
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest

from normkit.tolerance import expected_backward, worst

from .cases import Case, NumpyArray
from .frameworks import Framework, installed

EPS = 1e-5
NAMES = ("x", "residual", "weight", "bias")
SUBSETS = tuple(chain.from_iterable(combinations(NAMES, size) for size in range(1, 5)))
THROUGH = (("y",), ("residual_out",), ("y", "residual_out"))
DTYPES = {"same": ("float32", "float32"), "wider": ("bfloat16", "float32"), "narrower": ("float32", "float16")}
FRAMEWORKS = {name: framework for name, framework in installed().items() if name != "numpy"}
EACH = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])


def gradients(
    framework: Framework, kind: str, arrays: dict[str, Any], asks: tuple[str, ...], through: tuple[str, ...]
) -> tuple[NumpyArray, dict[str, NumpyArray | None]]:
    """Return residual_out and the gradients of the inputs that ask; None where torch says that there is none."""
    function = partial(getattr(framework.front_end, f"add_{kind}_norm"), eps=EPS)
    cotangents = {"y": arrays["dy"], "residual_out": arrays["dresidual_out"]}
    if framework.name == "torch":
        return _torch_gradients(framework, function, arrays, asks, [(name, cotangents[name]) for name in through])
    import jax

    def chosen(*given: Any) -> Any:
        merged = arrays | dict(zip(asks, given, strict=True))
        results = dict(zip(("y", "residual_out"), function(*(merged[name] for name in NAMES)), strict=True))
        return {name: results[name] for name in through}, results["residual_out"]

    _, vjp, residual_out = jax.vjp(chosen, *(arrays[name] for name in asks), has_aux=True)
    found = vjp({name: cotangents[name] for name in through})
    return np.asarray(residual_out), {name: np.asarray(value) for name, value in zip(asks, found, strict=True)}


def _torch_gradients(
    framework: Framework, function: Any, arrays: dict[str, Any], asks: tuple[str, ...], through: list[tuple[str, Any]]
) -> tuple[NumpyArray, dict[str, NumpyArray | None]]:
    import torch

    leaves = arrays | {name: arrays[name].detach().clone().requires_grad_() for name in asks}
    results = dict(zip(("y", "residual_out"), function(*(leaves[name] for name in NAMES)), strict=True))
    pairs = [(results[name], cotangent) for name, cotangent in through if results[name].requires_grad]
    found: tuple[Any, ...] = (None,) * len(asks)
    if pairs:
        outputs, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [leaves[name] for name in asks], given, allow_unused=True)
    residual_out = framework.numpy(results["residual_out"])
    assert residual_out is not None
    return residual_out, {name: framework.numpy(value) for name, value in zip(asks, found, strict=True)}


def _check(framework: Framework, case: Case, kind: str, asks: tuple[str, ...], through: tuple[str, ...]) -> None:
    given = case.arrays()
    if given["dresidual_out"] is None:
        given["dresidual_out"] = np.random.default_rng(1).standard_normal(case.shape).astype(case.x)
    arrays = {name: framework.array(array) for name, array in given.items()}
    h, found = gradients(framework, kind, arrays, asks, through)
    dy, dresidual_out = given["dy"], given["dresidual_out"]
    assert dy is not None
    expected = expected_backward(
        case.problem(),
        dy if "y" in through else np.zeros_like(dy),
        dresidual_out if "residual_out" in through else None,
        h,
        given["weight"],
    )
    for name in asks:
        value, where = found[name], (asks, through, name)
        if value is None:
            assert not expected[f"d{name}"].value.any(), where
            continue
        assert value.dtype == getattr(given[name], "dtype", None), where
        assert worst(value, expected[f"d{name}"]) <= 1, where


@pytest.fixture(autouse=True, params=["", "kernel"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with what is automatic, once (in torch) with an implementation that autograd cannot look into."""
    if request.param:
        if request.node.callspec.params["framework"].name != "torch":
            pytest.skip("JAX differentiates its functions by their own rule alone")
        from . import opaque

        opaque.install(monkeypatch)


@EACH
@KINDS
@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_subset_of_the_inputs(framework: Framework, kind: str, dtypes: str) -> None:
    x, residual = DTYPES[dtypes]
    case = Case("subsets", kind, (5, 24), x=x, residual=residual, weight="float32", bias="float32", eps=EPS)
    for asks in SUBSETS:
        for through in THROUGH:
            _check(framework, case, kind, asks, through)


@EACH
@KINDS
def test_every_subset_without_a_residual(framework: Framework, kind: str) -> None:
    case = Case("no_residual", kind, (5, 24), x="float32", residual=None, weight="float32", bias="float32", eps=EPS)
    for asks in SUBSETS:
        if "residual" not in asks:
            for through in THROUGH:
                _check(framework, case, kind, asks, through)


@EACH
@KINDS
def test_gradient_through_a_widened_residual_out_without_a_residual(framework: Framework, kind: str) -> None:
    rng = np.random.default_rng(3)
    x = framework.array(rng.standard_normal((5, 24)).astype(np.float16))
    cotangent = rng.standard_normal((5, 24)).astype(np.float32)
    function = getattr(framework.front_end, f"add_{kind}_norm")
    if framework.name == "torch":
        import torch

        x.requires_grad_()
        (dx,) = torch.autograd.grad(function(x, None, residual_dtype="float32")[1], x, framework.array(cotangent))
    else:
        import jax

        _, vjp = jax.vjp(lambda x: function(x, None, residual_dtype="float32")[1], x)
        (dx,) = vjp(framework.array(cotangent))
    np.testing.assert_array_equal(framework.numpy(dx), cotangent.astype(np.float16))


@EACH
@KINDS
def test_gradient_through_residual_out_alone_where_rstd_is_infinite(framework: Framework, kind: str) -> None:
    """y of a row of zeros without eps is NaN; its residual_out is not, and nor is the gradient through that."""
    if framework.name == "jax":
        return  # it has zeros in the place of a gradient that there is none of, and zero times infinity is NaN
    rows, ones = framework.array(np.zeros((2, 8), np.float32)), framework.array(np.ones(8, np.float32))
    function = partial(getattr(framework.front_end, f"add_{kind}_norm"), eps=0.0)
    import torch

    leaves = [array.clone().requires_grad_() for array in (rows, rows, ones, ones)]
    found = torch.autograd.grad(function(*leaves)[1], leaves, torch.ones(2, 8), allow_unused=True)
    for gradient, expected in zip(found, (1.0, 1.0, 0.0, 0.0), strict=True):
        assert (gradient == expected).all() if expected else gradient is None


@EACH
@KINDS
def test_the_gradient_of_the_residual_stream_reaches_the_first_block(framework: Framework, kind: str) -> None:
    """Two blocks without anything between: the stream's gradient is the sum over both norms and the end of the stream."""
    rng = np.random.default_rng(4)
    x, branch, dy, dstream = (rng.standard_normal((3, 16)) for _ in range(4))
    function = getattr(framework.front_end, f"add_{kind}_norm")

    def blocks(x: Any, branch: Any) -> Any:
        normed, stream = function(x, None)
        again, stream = function(branch, stream)
        return normed, again, stream

    cotangents = [array.astype(np.float32) for array in (dy, 2 * dy, dstream)]
    arrays = [framework.array(array.astype(np.float32)) for array in (x, branch)]
    if framework.name == "torch":
        import torch

        leaves = [array.requires_grad_() for array in arrays]
        found = torch.autograd.grad(blocks(*leaves), leaves, [framework.array(array) for array in cotangents])
    else:
        import jax

        found = jax.vjp(blocks, *arrays)[1](tuple(map(framework.array, cotangents)))
    expected_branch = _gradient_in_float64(kind, x + branch, 2 * dy) + dstream
    expected_x = _gradient_in_float64(kind, x, dy) + expected_branch
    for value, expected in zip(found, (expected_x, expected_branch), strict=True):
        np.testing.assert_allclose(framework.numpy(value), expected, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def _gradient_in_float64(kind: str, h: NumpyArray, dy: NumpyArray) -> NumpyArray:
    centred = h - (h.mean(-1, keepdims=True) if kind == "layer" else 0.0)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + {"rms": 1e-6, "layer": 1e-5}[kind])
    x_hat = centred * rstd
    dh = dy - x_hat * (x_hat * dy).mean(-1, keepdims=True) - (dy.mean(-1, keepdims=True) if kind == "layer" else 0.0)
    result: NumpyArray = dh * rstd
    return result
