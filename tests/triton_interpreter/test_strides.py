# SPDX-License-Identifier: Apache-2.0
"""Views are computed where they lie, and right: padded rows, packed projections, expanded gradients; others are copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit_torch
from normkit.tolerance import expected_backward, expected_forward, worst

from ..cases import Case
from ..frameworks import Torch
from ..interpreter import watch
from .test_memory import check_traffic

TORCH = Torch()
View = Callable[[tuple[int, ...], torch.dtype], Tensor]


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _normal(*shape, dtype=dtype)


def padded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows with 8 elements between them, and a first one that is not the storage's."""
    return _normal(*shape[:-1], shape[-1] + 8, dtype=dtype)[..., 4:-4]


def odd(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows that start at odd elements, every third one of the storage."""
    return _normal(3 * shape[0], *shape[1:-1], shape[-1] + 5, dtype=dtype)[1::3, ..., 3:-2]


def packed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The middle third of each row of a packed projection, split into heads where there are any."""
    heads = shape[-2:] if len(shape) > 2 else shape[-1:]
    width = heads.numel() if isinstance(heads, torch.Size) else heads[0] * (heads[1] if len(heads) > 1 else 1)
    leading = shape[: len(shape) - len(heads)]
    return _normal(*leading, 3 * width, dtype=dtype)[..., width : 2 * width].unflatten(-1, heads)


def swapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The two dimensions before the last in the other order, as attention has its heads."""
    return _normal(*shape[:-3], shape[-2], shape[-3], shape[-1], dtype=dtype).transpose(-3, -2)


def every_second(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _normal(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def same_row(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _normal(1, *shape[1:], dtype=dtype).expand(shape)


ALL = {view.__name__: view for view in (contiguous, padded, odd, packed, swapped, every_second, same_row)}
# x, residual, whether x and the residual are read where they are: four dimensions, so that all views exist
PAIRS = [
    ("padded", "padded", (True, True)),
    ("padded", "contiguous", (True, True)),
    ("contiguous", "odd", (True, True)),
    ("odd", "padded", (True, True)),
    ("packed", "packed", (True, True)),
    ("packed", "contiguous", (True, True)),
    ("swapped", "contiguous", (True, True)),
    ("same_row", "padded", (True, True)),
    ("every_second", "contiguous", (False, True)),
    ("padded", "every_second", (True, False)),
]


@pytest.mark.parametrize(("x", "residual", "in_place"), PAIRS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("shape", [(5, 3, 40), (2, 2, 17000)], ids=str)
def test_forward(x: str, residual: str, in_place: tuple[bool, bool], shape: tuple[int, ...]) -> None:
    case = Case("view", "layer", shape, x="float32", residual="float32", bias="float32", weight="float32")
    weight, bias = _normal(shape[-1], dtype=torch.float32), _normal(shape[-1], dtype=torch.float32)
    given = {"x": ALL[x](shape, torch.float32), "residual": ALL[residual](shape, torch.float32)}
    with watch() as launches:
        y, residual_out = normkit_torch.add_layer_norm(given["x"], given["residual"], weight, bias, implementation="triton")
    (launch,) = launches
    for (name, tensor), uncopied in zip(given.items(), in_place, strict=True):
        assert (launch.tensors[name].data_ptr() == tensor.data_ptr()) == uncopied, name
    assert y.is_contiguous() and residual_out.is_contiguous()
    if "same_row" not in (x, residual):
        check_traffic(launch)
    arrays = {name: TORCH.numpy(tensor) for name, tensor in (given | {"weight": weight, "bias": bias}).items()}
    expected_y, expected_residual_out = expected_forward(case.problem(), **arrays)
    assert worst(TORCH.numpy(y), expected_y) <= 1
    assert worst(TORCH.numpy(residual_out), expected_residual_out) <= 1


def _all_equal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What the gradient of a sum is."""
    return torch.ones((), dtype=dtype).expand(shape)


@pytest.mark.parametrize("shape", [(5, 3, 40), (2, 2, 9000)], ids=str)
@pytest.mark.parametrize(
    ("dy", "dresidual_out", "in_place"),
    [
        ("same_row", "same_row", (True, True)),
        ("padded", "same_row", (True, True)),
        ("swapped", "contiguous", (True, True)),
        ("odd", "padded", (True, True)),
        ("all_equal", "contiguous", (False, True)),
        ("contiguous", "all_equal", (True, False)),
        ("every_second", "swapped", (False, True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_backward(dy: str, dresidual_out: str, in_place: tuple[bool, bool], shape: tuple[int, ...]) -> None:
    case = Case("view", "rms", shape, x="bfloat16", residual="float32", bias="float32")
    views = ALL | {"all_equal": _all_equal}
    arrays: dict[str, Any] = {name: TORCH.array(array) for name, array in case.arrays().items()}
    arrays |= {"dy": views[dy](shape, torch.bfloat16), "dresidual_out": views[dresidual_out](shape, torch.float32)}
    with watch() as launches:
        h, gradients = TORCH.gradients(case, arrays, "triton")
    for launch in launches:
        for name, uncopied in zip(("dy", "dresidual_out"), in_place, strict=True):
            if name in launch.tensors:
                assert (launch.tensors[name].data_ptr() == arrays[name].data_ptr()) == uncopied, name
    operands = [TORCH.numpy(tensor) for tensor in (arrays["dy"], arrays["dresidual_out"], h, arrays["weight"])]
    expected = expected_backward(case.problem(), *operands)
    for name, gradient in gradients.items():
        assert worst(TORCH.numpy(gradient), expected[f"d{name}"]) <= 1, name


def test_the_gradient_of_a_sum() -> None:
    x = _normal(4, 96, dtype=torch.float32).requires_grad_()
    residual = _normal(4, 96, dtype=torch.float32).requires_grad_()
    y, residual_out = normkit_torch.add_rms_norm(x, residual, implementation="triton")
    (y.sum() + residual_out.sum()).backward()
    case = Case("sum", "rms", (4, 96), x="float32", residual="float32", weight=None, eps=1e-6)
    ones = torch.ones(4, 96).numpy()
    expected = expected_backward(case.problem(), ones, ones, residual_out.detach().numpy())
    assert x.grad is not None and residual.grad is not None
    assert worst(x.grad.numpy(), expected["dx"]) <= 1
    assert torch.equal(x.grad, residual.grad)


@pytest.mark.parametrize("view", ["contiguous", "padded", "odd", "packed", "swapped"])
@pytest.mark.parametrize("shape", [(5, 3, 40), (2, 2, 17000)], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_in_place_gives_the_same_bits(kind: str, shape: tuple[int, ...], view: str) -> None:
    x, residual = ALL[view](shape, torch.float32), ALL["padded"](shape, torch.bfloat16)
    weight = _normal(shape[-1], dtype=torch.float32)
    expected = getattr(normkit_torch, f"add_{kind}_norm")(x, residual, weight, implementation="triton")
    around = [(tensor, _around(tensor)) for tensor in (x, residual)]
    before = [outside.clone() for _, outside in around]
    with watch() as launches:
        given = getattr(normkit_torch, f"add_{kind}_norm_")(x, residual, weight, implementation="triton")
    (launch,) = launches
    assert all((launch.writes(name) == 1).all() for name in ("x", "residual"))
    assert given[0] is x and given[1] is residual
    assert torch.equal(x, expected[0]) and torch.equal(residual, expected[1])
    for (tensor, _), outside in zip(around, before, strict=True):
        assert torch.equal(_around(tensor), outside)


def _around(tensor: Tensor) -> Tensor:
    """The elements of a tensor's storage that are not its own."""
    everything = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    inside = torch.zeros(everything.shape, dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[...] = True
    return everything[~inside]


def test_rows_more_than_2_31_elements_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not touched is not there: of these gigabytes, only the pages of two rows are."""
    from triton.runtime import interpreter

    # it copies whole storages back, which on the CPU are the same memory
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    dtype = torch.bfloat16
    far = [torch.empty_strided((2, 64), (2**31 + 64, 1), dtype=dtype) for _ in range(2)]
    near = [_normal(2, 64, dtype=dtype), _normal(2, 64, dtype=dtype).flip(0)]
    for tensor, values in zip(far, near, strict=True):
        tensor.copy_(values)
    results = []
    for x, dy in (near, far):
        leaf = x.requires_grad_()
        y = normkit_torch.layer_norm(leaf, implementation="triton")
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0][0], results[0][0][1])
