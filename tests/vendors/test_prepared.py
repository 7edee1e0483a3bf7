# SPDX-License-Identifier: Apache-2.0
"""Calls like one before go from tensors to the vendor's operators, with the same results, and what is refused stays refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import normkit_torch
from normkit.errors import OptionError, ShapeError, UnsupportedError
from normkit_torch import dispatch, prepared

from .vendor import MODULE, NAME, rows


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    prepared.forget()
    yield
    prepared.forget()


def norm(name: str, *tensors: Tensor) -> Any:
    return getattr(normkit_torch, name)(*tensors, implementation=NAME)


def operands(name: str, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    arrays = [rows(*shape, seed=seed), *([rows(*shape, seed=seed + 1)] if "add" in name else []), rows(64, seed=seed + 2)]
    return [torch.from_numpy(array) for array in arrays]


def refuse(*_: object) -> None:
    raise AssertionError("the long way")


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "add_rms_norm_"])
def test_a_call_like_one_before_has_the_results_of_the_operators(name: str, shape: tuple[int, ...]) -> None:
    norm(name, *operands(name, shape, 0))
    tensors = operands(name, shape, 3)
    given, expected = [tensor.clone() for tensor in tensors], normkit_torch.__dict__[name.rstrip("_")]
    expected = expected(*given, implementation="reference")
    versions = [tensor._version for tensor in tensors]
    with patch.object(dispatch, "problem_of", refuse):
        found = norm(name, *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if name.endswith("_"):
        assert all(one is other for one, other in zip(found, tensors, strict=False))
        # by the operators themselves and by the call
        assert all(tensor._version > before for tensor, before in zip(tensors[:2], versions, strict=False))
    else:
        torch.testing.assert_close(tensors, given, rtol=0, atol=0)


def test_what_is_not_like_the_call_before_goes_the_long_way() -> None:
    x, residual, weight = operands("add_rms_norm", (5, 64), 0)
    norm("add_rms_norm", x, residual, weight)
    with pytest.raises(ShapeError):
        norm("add_rms_norm", x, residual, weight[:63])
    with pytest.raises(ShapeError):
        norm("add_rms_norm", x, residual[:4], weight)
    with pytest.raises(UnsupportedError, match="not contiguous"):
        norm("add_rms_norm", torch.from_numpy(rows(64, 5)).T, residual, weight)
    norm("add_rms_norm_", x, residual, weight)
    memory = torch.zeros(6, 64)
    with pytest.raises(OptionError):
        norm("add_rms_norm_", memory[:5], memory[1:], weight)


@pytest.mark.parametrize("times", [0, 1], ids=["cold", "prepared"])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "add_rms_norm_"])
def test_memory_that_was_freed(name: str, times: int) -> None:
    for _ in range(times):
        norm(name, *operands(name, (5, 64), 0))
    for place in range(2 + ("add" in name)):
        tensors = [tensor.clone() for tensor in operands(name, (5, 64), 0)]
        tensors[place].untyped_storage().resize_(0)
        with pytest.raises(OptionError, match="and no memory"):
            norm(name, *tensors)


def test_it_is_the_vendors_operators_that_run() -> None:
    tensors = operands("add_rms_norm", (5, 64), 0)
    calls = []
    compute = MODULE.compute

    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return compute(*arguments)

    with patch.object(MODULE, "compute", counting), patch.object(MODULE.rounding, "refusal", lambda *_: None):
        for _ in range(3):
            norm("add_rms_norm", *tensors)
    assert len(calls) == 3
