# SPDX-License-Identifier: Apache-2.0
"""Graphs of operators that run where more is asked than when they were traced: gradients, tangents, transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normkit import OptionError, UnsupportedError

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import normkit_torch
from normkit_torch import prepared

from .test_torch_compile import rows

# what forward mode takes from torch uses torch.jit, and torch copies a program by what it deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),
]
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
HOWS = pytest.mark.parametrize("how", ["make_fx", "export", "decomposed"])


class Calling(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Any:
        return self.function(*given)


def traced(how: str, function: Callable[..., Any], *given: Tensor) -> Any:
    """Return the graph of a function, traced without gradients, and called: what calls like that have prepared is there."""
    prepared.forget()
    with torch.no_grad():
        if how == "make_fx":
            graph: Any = make_fx(function)(*given)
        else:
            program = torch.export.export(Calling(function), given)
            graph = (program.run_decompositions() if how == "decomposed" else program).module()
        for _ in range(3):
            graph(*given)
    return graph


def norms(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return two norms: one that hands on a residual stream, one alone."""
    first, second = getattr(normkit_torch, f"add_{kind}_norm"), getattr(normkit_torch, f"{kind}_norm")

    def both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, residual_out = first(x, residual, weight)
        return second(y, weight), residual_out

    return both


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return rows(5, 8), rows(5, 8, seed=1), rows(8, seed=2)


@KINDS
@HOWS
def test_tangents_go_through_a_graph(kind: str, how: str) -> None:
    function, given = norms(kind), operands()
    tangents = tuple(rows(*tensor.shape, seed=7 + place) for place, tensor in enumerate(given))
    graph = traced(how, function, *given)
    expected = torch.func.jvp(function, given, tangents)
    for found, one in zip(torch.func.jvp(lambda *given: tuple(graph(*given)), given, tangents), expected, strict=True):
        torch.testing.assert_close(found, one)
    with forward_ad.dual_level():
        duals = graph(*map(forward_ad.make_dual, given, tangents))
        for dual, tangent in zip(duals, expected[1], strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


@KINDS
@HOWS
def test_transforms_of_a_graph(kind: str, how: str) -> None:
    function, given = norms(kind), operands()
    graph = traced(how, function, *given)

    def loss(function: Any) -> Callable[..., Tensor]:
        return lambda *given: function(*given)[0].pow(3).sum() + function(*given)[1].pow(3).sum()

    transforms: list[Callable[[Any], Any]] = [
        lambda f: torch.func.grad(loss(f), argnums=(0, 1, 2))(*given),
        lambda f: torch.func.hessian(loss(f))(*given),
        lambda f: torch.func.vmap(torch.func.grad(loss(f)))(*(torch.stack([one, 2 * one]) for one in given)),
    ]
    for transformed in transforms:
        torch.testing.assert_close(transformed(graph), transformed(function), rtol=1e-4, atol=1e-4)


def test_another_implementation_by_name_is_refused_in_a_graph_too() -> None:
    graph = traced("make_fx", lambda x: normkit_torch.rms_norm(x, implementation="cpu"), rows(5, 8))
    with pytest.raises(UnsupportedError, match=r"implementation='cpu' cannot be used under torch\.func"):
        torch.func.grad(lambda x: graph(x).sum())(rows(5, 8))


@KINDS
@HOWS
def test_a_graph_of_a_call_in_place_has_no_gradient(kind: str, how: str) -> None:
    in_place = getattr(normkit_torch, f"add_{kind}_norm_")

    def function(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return in_place(x.clone(), residual.clone(), weight)[0]

    graph = traced(how, function, *operands())
    expected = function(*operands())
    for asking in range(3):
        given = operands()
        given[asking].requires_grad_()
        for call in (function, graph):
            with pytest.raises(OptionError, match=f"add_{kind}_norm_ overwrites its inputs, and one of them requires"):
                call(*given)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(graph(*given), expected)
        with pytest.raises(OptionError, match=f"add_{kind}_norm_ overwrites its inputs, and one of them requires"):
            graph(*given)
    with pytest.raises(UnsupportedError, match=f"add_{kind}_norm_ cannot be used under"), forward_ad.dual_level():
        graph(*operands())


@KINDS
@pytest.mark.parametrize("without_residual", [False, True])
def test_what_calls_become_below_autograd_has_derivatives(kind: str, without_residual: bool) -> None:
    """Forward and backward, of first and second order: as in the graph of a training step, autograd's part included."""
    operators = torch.ops.normkit
    x, residual, weight = (tensor.double().requires_grad_() for tensor in operands())
    dy, dresidual_out = (rows(5, 8, seed=seed).double().requires_grad_() for seed in (8, 9))
    described = f"{kind} x_dtype=float64" + ("" if without_residual else " residual_dtype=float64 residual_out_dtype=float64")

    def step(x: Tensor, weight: Tensor, dy: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        residual, dresidual_out = others or (None, None)
        call = (x, residual, weight, None, f"add_{kind}_norm", 1e-2, 0.0)
        y, *rest = operators.norm_and_statistics(*call)
        h = x if without_residual else rest.pop(0)
        mean = None if kind == "rms" else rest.pop(0)
        wanted = [True, False, True, False]
        return y, *operators.norm_gradients(dy, dresidual_out, h, weight, mean, *rest, described, 1e-2, 0.0, wanted)

    given = (x, weight, dy) if without_residual else (x, weight, dy, residual, dresidual_out)
    assert torch.autograd.gradcheck(step, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(step, given)
