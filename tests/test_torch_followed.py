# SPDX-License-Identifier: Apache-2.0
"""What torch follows a call with: which results ask for a gradient, and what profilers and `explain` say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor
from torch.autograd import forward_ad

import normkit_torch
from normkit_torch import prepared

from .test_torch_compile import rows

# inductor imports parts of torch that use torch.jit, which torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])


def composed(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute add_layer_norm; not by layer_norm, of which IPEX has one without a gradient."""
    h = x if residual is None else x + residual
    centred = h - h.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias, h


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: function(*given, residual_dtype=torch.float64)


def through(operator: str) -> Callable[..., Any]:
    def call(*given: Tensor | None, residual_dtype: Any = None) -> Any:
        words = "add_layer_norm" if residual_dtype is None else "add_layer_norm residual_dtype=float64"
        y, *residual_out = getattr(torch.ops.normkit, operator)(*given, words, 1e-5, 0.0)
        return y, residual_out[0] if residual_dtype or given[1] is not None else given[0]

    return call


WAYS: dict[str, Callable[..., Any]] = {
    "eager": normkit_torch.add_layer_norm,
    "compiled": torch.compile(normkit_torch.add_layer_norm, fullgraph=True, backend="aot_eager"),
    "norm": through("norm"),
    "norm_and_statistics": through("norm_and_statistics"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("without_residual", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_a_result_asks_for_a_gradient_where_one_of_its_operands_does(way: str, without_residual: bool, wide: bool) -> None:
    prepared.forget()
    function = widened(WAYS[way]) if wide else WAYS[way]
    twice = way != "compiled"  # torch compiles no second derivative
    for asks, _ in product(product([False, True], repeat=4), range(1 + twice)):  # the second time, prepared
        torch.compiler.reset()
        x, residual, weight, bias = given = [rows(*shape, seed=len(shape)) for shape in ((3, 8), (3, 8), (8,), (8,))]
        for tensor, ask in zip(given, asks, strict=True):
            tensor.requires_grad_(ask)
        operands = (x, None if without_residual else residual, weight, bias)
        found, expected = function(*operands), composed(*operands)
        assert [one.requires_grad for one in found] == [one.requires_grad for one in expected], asks
        leaves = [tensor for tensor in operands if tensor is not None and tensor.requires_grad]
        if leaves:
            for one, other in zip(gradients(found, leaves, twice), gradients(expected, leaves, twice), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def gradients(results: tuple[Tensor, Tensor], leaves: list[Tensor], twice: bool) -> tuple[Tensor, ...]:
    """Return the gradients of a sum of cubes, and those of the sum of their squares."""
    loss = torch.stack([result.pow(3).sum() for result in results]).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=twice)
    return first + torch.autograd.grad([one.square().sum() for one in first], leaves) if twice else first


def test_a_stream_that_asks_for_no_gradient_is_free() -> None:
    x, residual, weight = rows(3, 8), rows(3, 8), rows(8).requires_grad_()
    for _ in range(2):
        _, stream = normkit_torch.add_rms_norm(x, residual, weight)
        assert stream.numpy().shape == (3, 8) and stream.grad_fn is None
        with torch.no_grad():
            normkit_torch.add_rms_norm_(x.clone(), stream, weight)


def profiled(function: Callable[[], Any]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "add_layer_norm_"])
def test_a_profiler_sees_eager_calls_by_name(name: str) -> None:
    given = [rows(3, 8) for _ in range(2 if name.startswith("add_") else 1)]
    prepared.forget()
    for _ in range(2):
        assert f"normkit::{name}" in profiled(lambda: getattr(normkit_torch, name)(*given))


def test_names_that_torch_shows_say_whose_they_are() -> None:
    x = rows(3, 8).requires_grad_()
    for y in (normkit_torch.rms_norm(x), torch.ops.normkit.norm(x, None, None, None, "rms_norm", 1e-6, 0.0)[0]):
        assert "NormkitNormBackward" in repr(y.grad_fn)
        (dx,) = torch.autograd.grad(y, x, rows(3, 8, seed=1), create_graph=True)
        assert "NormkitGradientBackward" in repr(dx.grad_fn)
        assert "NormkitNormBackward" in profiled(partial(y.backward, rows(3, 8)))


@KINDS
def test_explain_says_that_a_transform_takes_the_reference(kind: str) -> None:
    said: list[list[str]] = []

    def explained(x: Tensor) -> Tensor:
        for function, options in ((f"{kind}_norm", {}), (f"add_{kind}_norm_", {"residual": x}), (f"{kind}_norm", {"out": x})):
            verdicts = normkit_torch.explain(function, x, **options)
            said.append([one.name for one in verdicts if one.accepted])
            assert all("torch.func" in one.reason for one in verdicts if not one.accepted)
        return x

    x = rows(3, 8)
    torch.func.vmap(explained)(x)
    torch.func.jvp(explained, (x,), (x,))
    with forward_ad.dual_level():
        explained(x)
    assert said == [["reference"], [], []] * 3
    assert normkit_torch.explain(f"{kind}_norm", x)[-1].accepted
