# SPDX-License-Identifier: Apache-2.0
"""What torch does with a function: gradients of any order, torch.func, autocast, checkpointing, versions of tensors."""

from __future__ import annotations

from typing import Any

import pytest

from normkit import ShapeError, UnsupportedError

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import normkit_torch

from . import opaque

# what forward mode takes from torch uses torch.jit, which torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
RESIDUAL = pytest.mark.parametrize("without_residual", [False, True])


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(dtype: torch.dtype, hidden: int = 5) -> list[Tensor]:
    shapes = [(3, hidden)] * 2 + [(hidden,)] * 2
    return [rows(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def bound(kind: str, without_residual: bool, **options: Any) -> tuple[Any, list[Tensor]]:
    """Return a function of float64 leaves, and the leaves."""
    function = getattr(normkit_torch, f"add_{kind}_norm")
    x, residual, weight, bias = leaves(torch.float64)
    if without_residual:
        return lambda x, weight, bias: function(x, None, weight, bias, **options), [x, weight, bias]
    return lambda *given: function(*given, **options), [x, residual, weight, bias]


@KINDS
@RESIDUAL
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kernel", [False, True])
def test_gradients_of_first_and_second_order(
    kind: str, without_residual: bool, offset: float, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, given = bound(kind, without_residual, weight_offset=offset, eps=1e-2)
    if kernel:
        opaque.install(monkeypatch)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@KINDS
@RESIDUAL
def test_third_derivative(kind: str, without_residual: bool) -> None:
    function, given = bound(kind, without_residual, eps=1e-2)
    weights = rows(3, 5, seed=9, dtype=torch.float64)

    def gradient(*tensors: Tensor) -> Any:
        y, residual_out = function(*tensors)
        loss = (y * weights).sum() + residual_out.pow(3).sum()
        return torch.autograd.grad(loss, tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, given)


@KINDS
def test_an_edge_of_the_graph_may_be_missing(kind: str) -> None:
    """The second derivative where residual_out is not used, then where y is not."""
    x, residual, weight, _ = leaves(torch.float64)
    function = getattr(normkit_torch, f"add_{kind}_norm")
    for used in (0, 1):
        assert torch.autograd.gradgradcheck(lambda *given, used=used: function(*given)[used], (x, residual, weight))


def _hand_written(kind: str, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    centred = h if kind == "rms" else h - h.mean(-1, keepdim=True)
    eps = {"rms": 1e-6, "layer": 1e-5}[kind]
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight, h


@KINDS
def test_torch_func(kind: str) -> None:
    x, residual, weight, _ = (leaf.detach() for leaf in leaves(torch.float64))
    other = rows(3, 5, seed=4, dtype=torch.float64)
    function = getattr(normkit_torch, f"add_{kind}_norm")

    def plain(*given: Tensor) -> Any:
        return _hand_written(kind, *given)

    def loss(function: Any) -> Any:
        return lambda *given: (function(*given)[0] * other).sum() + function(*given)[1].pow(3).sum()

    func = torch.func
    for transformed in (
        lambda f: func.grad(loss(f), argnums=(0, 1, 2))(x, residual, weight),
        lambda f: func.jvp(f, (x, residual, weight), (other, x, weight)),
        lambda f: func.vjp(f, x, residual, weight)[1]((other, x)),
        lambda f: func.jacrev(f)(x, residual, weight),
        lambda f: func.jacfwd(f, argnums=2)(x, residual, weight),
        lambda f: func.hessian(loss(f))(x, residual, weight),
    ):
        torch.testing.assert_close(transformed(function), transformed(plain))


@KINDS
@pytest.mark.parametrize("in_dims", [(0, 0, None), (1, None, None), (None, None, 0), (0, 2, 1)])
def test_vmap(kind: str, in_dims: tuple[int | None, ...]) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm")
    given = []
    for seed, (shape, dim) in enumerate(zip([(3, 8), (3, 8), (8,)], in_dims, strict=True)):
        batched = list(shape)
        if dim is not None:
            batched.insert(dim, 4)
        given.append(rows(*batched, seed=seed))
    found = torch.func.vmap(function, in_dims=in_dims)(*given)
    for index in range(4):
        one = [tensor if dim is None else tensor.select(dim, index) for tensor, dim in zip(given, in_dims, strict=True)]
        for result, expected in zip(found, function(*one), strict=True):
            torch.testing.assert_close(result[index], expected)
    gradients = torch.func.vmap(torch.func.grad(lambda *given: function(*given)[0].pow(3).sum()), in_dims=in_dims)(*given)
    assert gradients.shape == (4, 3, 8)


def test_under_a_transform_an_explicit_choice_is_kept_or_refused() -> None:
    x = rows(4, 3, 8)
    norms = torch.func.vmap(lambda x: normkit_torch.rms_norm(x, implementation="reference"))(x)
    assert torch.equal(norms, torch.func.vmap(normkit_torch.rms_norm)(x))
    with pytest.raises(UnsupportedError, match=r"implementation='triton' cannot be used under torch\.func"):
        torch.func.vmap(lambda x: normkit_torch.rms_norm(x, implementation="triton"))(x)
    with pytest.raises(UnsupportedError, match=r"add_rms_norm_ cannot be used under torch\.func"):
        torch.func.vmap(lambda x: normkit_torch.add_rms_norm_(x, x.clone()))(x)
    with pytest.raises(ShapeError, match=r"\(3, 8\)"):
        torch.func.vmap(lambda x: normkit_torch.add_rms_norm(x, x[:2]))(x)


@KINDS
def test_forward_mode(kind: str) -> None:
    x, residual, weight, _ = (leaf.detach() for leaf in leaves(torch.float64))
    tangent = rows(3, 5, seed=4, dtype=torch.float64)
    function = getattr(normkit_torch, f"add_{kind}_norm")
    expected = torch.func.jvp(lambda x: function(x, residual, weight), (x,), (tangent,))[1]
    with forward_ad.dual_level():
        found = function(forward_ad.make_dual(x, tangent), residual, weight)
        for dual, derivative in zip(found, expected, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, derivative)


def test_forward_mode_never_loses_a_tangent_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    opaque.install(monkeypatch)
    assert normkit_torch.explain("rms_norm", rows(3, 5))[0].name == opaque.NAME
    with forward_ad.dual_level():
        dual = normkit_torch.rms_norm(forward_ad.make_dual(rows(3, 5), rows(3, 5, seed=1)))
        assert forward_ad.unpack_dual(dual).tangent is not None


@KINDS
def test_gradients_batched(kind: str) -> None:
    function, given = bound(kind, without_residual=False)
    cotangents = rows(7, 3, 5, seed=5, dtype=torch.float64)
    batched = torch.autograd.grad(function(*given)[0], given, cotangents, is_grads_batched=True)
    for index in range(7):
        for result, expected in zip(batched, torch.autograd.grad(function(*given)[0], given, cotangents[index]), strict=True):
            torch.testing.assert_close(result[index], expected)


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm")
    cotangents = [rows(3, 5, seed=6), rows(3, 5, seed=7)]
    results = []
    for checkpointed in (False, True):
        given = leaves(torch.float32)
        outputs = checkpoint(function, *given, use_reentrant=reentrant) if checkpointed else function(*given)
        torch.autograd.backward(outputs, cotangents)
        results.append([leaf.grad for leaf in given])
    for found, expected in zip(*results, strict=True):
        assert found is not None and expected is not None
        assert torch.equal(found, expected)


@KINDS
@pytest.mark.parametrize("gradient", [False, True])
def test_autocast_changes_no_dtype_and_no_bit(kind: str, gradient: bool) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm")
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight, bias = (leaf.detach() for leaf in leaves(torch.float32))
        given = [tensor.requires_grad_(gradient) for tensor in (x.to(dtype), residual, weight, bias)]
        expected = function(*given)
        with torch.autocast("cpu", torch.bfloat16):
            found = function(*given)
        assert [tensor.dtype for tensor in found] == [dtype, torch.float32]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@KINDS
def test_autocast_changes_nothing_in_place_written_compiled_or_backward(kind: str) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm")
    compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")

    def results() -> list[Tensor]:
        x, residual, weight, _ = (leaf.detach() for leaf in leaves(torch.float32))
        x, out, residual_out = x.bfloat16(), torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(3, 5)
        made = [*function(x, residual, weight, out=out, residual_out=residual_out)]
        made += getattr(normkit_torch, f"add_{kind}_norm_")(x.clone(), residual.clone(), weight)
        given = [tensor.requires_grad_() for tensor in (x, residual, weight)]
        for call in (function, compiled):
            y, stream = call(*given)
            made += [y.detach(), stream.detach(), *torch.autograd.grad((y, stream), given, (torch.ones_like(y), stream))]
        return made

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            for found, one in zip(results(), expected, strict=True):
                assert found.dtype == one.dtype and torch.equal(found, one)


@KINDS
@pytest.mark.parametrize("kernel", [False, True])
def test_in_place_bumps_versions_so_that_autograd_notices(kind: str, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel:
        opaque.install(monkeypatch)
    function = getattr(normkit_torch, f"add_{kind}_norm_")
    x, residual, weight, _ = (leaf.detach() for leaf in leaves(torch.float32))
    factor = rows(3, 5, seed=3).requires_grad_()
    product = x * factor
    versions = x._version, residual._version, weight._version
    function(x, residual, weight)
    assert x._version > versions[0] and residual._version > versions[1] and weight._version == versions[2]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward(torch.ones_like(product))


def test_in_place_on_inference_tensors() -> None:
    expected = normkit_torch.add_rms_norm(rows(3, 5), rows(3, 5, seed=1))
    with torch.inference_mode():
        found = normkit_torch.add_rms_norm_(rows(3, 5), rows(3, 5, seed=1))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_a_saved_input_that_is_changed_before_backward_is_noticed() -> None:
    x, weight = rows(3, 5).requires_grad_(), rows(5).requires_grad_()
    hidden = x * 1
    y = normkit_torch.rms_norm(hidden, weight)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))


class Labelled(Tensor):
    """A subclass that torch carries through operations."""


@KINDS
def test_a_subclass_of_tensor_is_carried_through(kind: str) -> None:
    x, residual, weight, bias = (leaf.detach() for leaf in leaves(torch.float32))
    function = getattr(normkit_torch, f"add_{kind}_norm")
    for found, expected in zip(
        function(x.as_subclass(Labelled), residual, weight, bias), function(x, residual, weight, bias), strict=True
    ):
        assert torch.equal(found.as_subclass(Tensor), expected)
        assert type(found) is Labelled


def test_gradients_accumulate_over_calls() -> None:
    x, residual, weight, _ = leaves(torch.float32)
    cotangent = rows(3, 5, seed=8)
    for _ in range(2):
        y, _ = normkit_torch.add_rms_norm(x, residual, weight)
        y.backward(cotangent)
    twice = weight.grad
    weight.grad = None
    y, _ = normkit_torch.add_rms_norm(x, residual, weight)
    y.backward(cotangent)
    assert twice is not None and weight.grad is not None and torch.equal(twice, 2 * weight.grad)
