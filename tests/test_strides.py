# SPDX-License-Identifier: Apache-2.0
"""Views of any strides, forward and backward, give what their contiguous copies give; results are contiguous."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from normkit.tolerance import expected_backward, expected_forward, worst

from .cases import Case, NumpyArray
from .frameworks import installed

FRAMEWORKS = installed()
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
SHAPE = (4, 6, 24)
RNG = np.random.default_rng(11)


def _normal(*shape: int) -> NumpyArray:
    return RNG.standard_normal(shape).astype(np.float32)


VIEWS: dict[str, Callable[[], NumpyArray]] = {
    "transposed": lambda: _normal(6, 4, 24).transpose(1, 0, 2),
    "transposed along the row": lambda: _normal(24, 6, 4).T,
    "channels last": lambda: _normal(4, 24, 6).transpose(0, 2, 1),
    "columns of a wider array": lambda: _normal(4, 6, 30)[..., 3:27],
    "every second row": lambda: _normal(4, 12, 24)[:, ::2],
    "every second column": lambda: _normal(4, 6, 48)[..., ::2],
    "one of three packed": lambda: _normal(4, 6, 3, 24)[:, :, 1],
    "the same row again and again": lambda: np.broadcast_to(_normal(24), SHAPE),
    "the same batch again": lambda: np.broadcast_to(_normal(1, 6, 24), SHAPE),
    "one value along the row": lambda: np.broadcast_to(_normal(4, 6, 1), SHAPE),
    "one value everywhere": lambda: np.broadcast_to(_normal(1), SHAPE),
}
NEGATIVE: dict[str, Callable[[], NumpyArray]] = {
    "rows reversed": lambda: _normal(*SHAPE)[:, ::-1],
    "columns reversed": lambda: _normal(*SHAPE)[..., ::-1],
}


def _torch_view(array: NumpyArray) -> Any:
    """The same strides in torch, on the device under test."""
    import torch

    flat = array
    while isinstance(flat.base, np.ndarray):
        flat = flat.base
    buffer = FRAMEWORKS["torch"].array(np.ascontiguousarray(flat).reshape(-1))
    offset = (array.__array_interface__["data"][0] - flat.__array_interface__["data"][0]) // array.itemsize
    view = torch.as_strided(buffer, array.shape, [step // array.itemsize for step in array.strides], offset)
    np.testing.assert_array_equal(view.cpu().numpy(), array)
    return view


def _case(kind: str) -> Case:
    return Case("strided", kind, SHAPE, x="float32", residual="float32", weight="float32", bias="float32")


@KINDS
@pytest.mark.parametrize("view", [*VIEWS, *NEGATIVE])
@pytest.mark.parametrize("operand", ["x", "residual", "both"])
def test_numpy(kind: str, view: str, operand: str) -> None:
    case, framework = _case(kind), FRAMEWORKS["numpy"]
    arrays = case.arrays()
    for name in ("x", "residual") if operand == "both" else (operand,):
        arrays[name] = (VIEWS | NEGATIVE)[view]()
    y, residual_out = framework.call(case, arrays, None)
    _check_forward(case, arrays, y, residual_out)
    assert y.flags.c_contiguous and residual_out.flags.c_contiguous


def _check_forward(case: Case, arrays: dict[str, Any], y: NumpyArray, residual_out: NumpyArray) -> None:
    given = {name: arrays[name] for name in ("x", "residual", "weight", "bias")}
    expected_y, expected_residual_out = expected_forward(case.problem(), **given, residual_out=residual_out)
    assert worst(y, expected_y) <= 1
    assert worst(residual_out, expected_residual_out) <= 1


@KINDS
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("operand", ["x", "residual", "both"])
@pytest.mark.parametrize("gradient", [False, True])
def test_torch_forward(kind: str, view: str, operand: str, gradient: bool) -> None:
    pytest.importorskip("torch")
    case, framework = _case(kind), FRAMEWORKS["torch"]
    arrays: dict[str, Any] = case.arrays()
    tensors = {name: framework.array(array) for name, array in arrays.items()}
    for name in ("x", "residual") if operand == "both" else (operand,):
        arrays[name] = VIEWS[view]()
        tensors[name] = _torch_view(arrays[name]).requires_grad_(gradient)
    y, residual_out = framework.call(case, tensors, None)
    _check_forward(case, arrays, np.asarray(framework.numpy(y)), np.asarray(framework.numpy(residual_out)))
    assert y.is_contiguous() and residual_out.is_contiguous()


@KINDS
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("without_residual", [False, True])
def test_torch_backward(kind: str, view: str, without_residual: bool) -> None:
    """The view is x and both incoming gradients."""
    torch = pytest.importorskip("torch")
    case, framework = _case(kind), FRAMEWORKS["torch"]
    arrays = case.arrays() | {name: VIEWS[view]() for name in ("x", "dy", "dresidual_out")}
    tensors = {name: framework.array(array) for name, array in arrays.items()}
    views = {name: _torch_view(arrays[name]) for name in ("x", "dy", "dresidual_out")}  # type: ignore[arg-type]
    names = ["x", "weight", "bias"] if without_residual else ["x", "residual", "weight", "bias"]
    leaves = {name: (views | {"x": views["x"]}).get(name, tensors[name]).requires_grad_() for name in names}
    operands = [leaves.get(name) for name in ("x", "residual", "weight", "bias")]
    y, residual_out = getattr(framework.front_end, f"add_{kind}_norm")(*operands, eps=case.eps)
    found = torch.autograd.grad([y, residual_out], list(leaves.values()), [views["dy"], views["dresidual_out"]])
    problem = Case(**(vars(case) | {"residual": None})).problem() if without_residual else case.problem()
    h = np.asarray(framework.numpy(residual_out))
    expected = expected_backward(problem, arrays["dy"], arrays["dresidual_out"], h, arrays["weight"])
    for name, gradient in zip(names, found, strict=True):
        assert worst(np.asarray(framework.numpy(gradient)), expected[f"d{name}"]) <= 1, name
        assert without_residual or gradient.is_contiguous()


@KINDS
def test_the_gradient_of_a_sum(kind: str) -> None:
    """Its strides are all 0, here for y and residual_out."""
    torch = pytest.importorskip("torch")
    case, framework = _case(kind), FRAMEWORKS["torch"]
    tensors = {name: framework.array(array) for name, array in case.arrays().items()}
    results = []
    for summed in (True, False):
        leaves = [tensors[name].clone().requires_grad_() for name in ("x", "residual", "weight", "bias")]
        y, residual_out = getattr(framework.front_end, f"add_{kind}_norm")(*leaves)
        if summed:
            (y.sum() + 2 * residual_out.sum()).backward()
        else:
            torch.autograd.backward([y, residual_out], [torch.ones_like(y), torch.full_like(y, 2.0)])
        results.append([leaf.grad for leaf in leaves])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("view", [name for name in VIEWS if "same" not in name and "one value" not in name])
def test_torch_in_place(kind: str, view: str) -> None:
    pytest.importorskip("torch")
    case, framework = _case(kind), FRAMEWORKS["torch"]
    arrays = case.arrays() | {name: VIEWS[view]() for name in ("x", "residual")}
    tensors = {name: framework.array(array) for name, array in arrays.items()}
    x, residual = (_torch_view(arrays[name]) for name in ("x", "residual"))  # type: ignore[arg-type]
    function = getattr(framework.front_end, f"add_{kind}_norm_")
    y, residual_out = function(x, residual, tensors["weight"], tensors["bias"], eps=case.eps)
    assert y is x and residual_out is residual
    _check_forward(case, arrays, np.asarray(framework.numpy(y)), np.asarray(framework.numpy(residual_out)))


@KINDS
def test_weight_and_bias_with_strides(kind: str) -> None:
    pytest.importorskip("torch")
    case, framework = _case(kind), FRAMEWORKS["torch"]
    arrays = case.arrays() | {"weight": _normal(48)[::2], "bias": np.broadcast_to(_normal(1), (24,))}
    tensors = {name: framework.array(array) for name, array in arrays.items()}
    for name in ("weight", "bias"):
        tensors[name] = _torch_view(arrays[name])
    y, residual_out = framework.call(case, tensors, None)
    _check_forward(case, arrays, np.asarray(framework.numpy(y)), np.asarray(framework.numpy(residual_out)))
