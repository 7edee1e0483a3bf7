# SPDX-License-Identifier: Apache-2.0
"""Parts of torch that are private, and that prepared calls rely on: a torch in which they differ is seen here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor
from torch._C import _increment_version
from torch._C._dynamo.guards import TensorGuards


class Logged(Tensor):
    pass


def rows(*shape: int) -> Tensor:
    return torch.randn(shape)


def _guard(*tensors: Tensor) -> Any:
    sizes, strides = ([[*of(tensor)] for tensor in tensors] for of in (Tensor.size, Tensor.stride))
    guards: Any = TensorGuards
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_the_guard_of_torch() -> None:
    x, weight = rows(3, 8), rows(8)
    fits = _guard(x, weight).check
    assert fits(x, weight) and fits(rows(3, 8), rows(8)) and fits(rows(4, 8)[1:], rows(8))
    with torch.inference_mode():
        of_inference = rows(3, 8) * 1
        assert not fits(of_inference, weight) and not fits(x, weight)
        assert _guard(x).check(x) and not _guard(x).check(of_inference)
    others = (
        *(rows(*shape) for shape in ((4, 8), (24,), (3, 9), (1, 3, 8))),
        *(x.to(dtype) for dtype in (torch.float64, torch.bfloat16)),
        *(rows(3, 16)[:, ::2], rows(8, 3).t(), rows(8).expand(3, 8), torch._neg_view(x), x.to_sparse(), x.to("meta")),
        *(rows(3, 8).requires_grad_(), torch.nn.Parameter(x), x.as_subclass(Logged), of_inference),
    )
    assert not any(fits(other, weight) for other in others)
    assert not any(fits(other, weight) for other in (None, [1.0], np.ones((3, 8))))
    assert not _guard(rows(3, 8), rows(3, 8)).check(x, x)
    seen: list[bool] = []
    saw: Any = seen.append
    torch.func.vmap(lambda row: (saw(fits(x, weight)), row)[1])(x)
    torch.func.grad(lambda row: (saw(fits(x, weight)), row.sum())[1])(x)
    torch.jit.trace(lambda row: (saw(fits(x, weight)), row + 1)[1], (x,), check_trace=False)
    assert seen == [False] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(x, weight)


def test_the_counter_of_torch() -> None:
    x, y = rows(3, 8), rows(3, 8)
    _increment_version((x,))
    _increment_version((x, y[1:]))
    assert (x._version, y._version) == (2, 1)
