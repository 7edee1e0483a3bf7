# SPDX-License-Identifier: Apache-2.0
"""What cannot be computed in place is refused, and leaves x and the residual as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normkit import NormkitError, OptionError

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor

import normkit_torch

BOTH = pytest.mark.parametrize("function", [normkit_torch.add_rms_norm_, normkit_torch.add_layer_norm_])
Function = Callable[..., Any]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refused(function: Function, *tensors: Tensor | None, match: str, **options: Any) -> None:
    """Assert an OptionError, and that no tensor and no version of one has changed."""
    given = [tensor for tensor in tensors if tensor is not None]
    before, versions = [tensor.detach().clone() for tensor in given], [tensor._version for tensor in given]
    with pytest.raises(OptionError, match=match) as caught:
        function(*tensors, **options)
    assert isinstance(caught.value, NormkitError) and isinstance(caught.value, ValueError)
    for tensor, expected in zip(given, before, strict=True):
        assert torch.equal(tensor, expected)
    assert [tensor._version for tensor in given] == versions


@BOTH
@pytest.mark.parametrize("operand", range(4))
def test_a_gradient(function: Function, operand: int) -> None:
    tensors = [rows(3, 8), rows(3, 8, seed=1), rows(8), rows(8)]
    tensors[operand].requires_grad_()
    functional = function.__name__.removesuffix("_")
    refused(function, *tensors, match=rf"{function.__name__} .*use {functional}, or torch.no_grad")
    with torch.no_grad():
        function(*tensors)


@BOTH
def test_no_residual(function: Function) -> None:
    functional = function.__name__.removesuffix("_")
    refused(function, rows(3, 8), None, match=rf"^{functional}_ needs a residual.* got None: give one, or use {functional}$")


@BOTH
def test_expanded_memory(function: Function) -> None:
    refused(function, rows(8).expand(3, 8), rows(3, 8), match="^in place, x is written to")
    refused(function, rows(3, 8), rows(3, 1).expand(3, 8), match="^in place, residual is written to")
    x = rows(1, 8).expand(1, 8)
    function(x, rows(1, 8))


@BOTH
def test_rows_that_overlap_each_other(function: Function) -> None:
    overlapping = rows(20).as_strided((4, 8), (4, 1))
    refused(function, overlapping, rows(4, 8), match="in place, x")
    refused(function, rows(4, 8), overlapping, match="in place, residual")


@BOTH
def test_x_and_residual_in_one_memory(function: Function) -> None:
    x = rows(4, 8)
    refused(function, x, x, match="must not share memory")
    refused(function, x, x.view(4, 8), match="must not share memory")


@BOTH
@pytest.mark.parametrize("shift", [1, 3, 8, 31])
def test_x_and_residual_that_overlap_in_part(function: Function, shift: int) -> None:
    buffer = rows(100)
    refused(function, buffer[:32].view(4, 8), buffer[shift : shift + 32].view(4, 8), match="must not share memory")
    refused(function, buffer[shift : shift + 32].view(4, 8), buffer[:32].view(4, 8), match="must not share memory")


@BOTH
@pytest.mark.parametrize("operand", [2, 3])
def test_weight_or_bias_in_the_memory_of_x_or_residual(function: Function, operand: int) -> None:
    for shared in (0, 1):
        tensors: list[Tensor | None] = [rows(3, 8), rows(3, 8, seed=1), None, None]
        row = tensors[shared]
        assert row is not None
        tensors[operand] = row[1]
        refused(function, *tensors, match="share memory")


@BOTH
def test_neighbours_in_one_buffer_do_not_share_memory(function: Function) -> None:
    def halves() -> list[tuple[Tensor, Tensor]]:
        return [
            (rows(8, 8)[:4], rows(8, 8)[4:]),
            (lambda packed: (packed[:, :8], packed[:, 8:]))(rows(4, 16)),
            (lambda packed: (packed[:, 0], packed[:, 1]))(rows(4, 2, 8)),
            (lambda packed: (packed[0], packed[1]))(rows(2, 4, 8)),
        ]

    functional = getattr(normkit_torch, function.__name__.removesuffix("_"))
    for (x, residual), (x_before, residual_before) in zip(halves(), halves(), strict=True):
        expected = functional(x_before.clone(), residual_before.clone())
        y, residual_out = function(x, residual)
        assert y is x and residual_out is residual
        assert torch.equal(y, expected[0]) and torch.equal(residual_out, expected[1])


@BOTH
def test_options_that_would_change_a_dtype_do_not_exist(function: Function) -> None:
    for option in ("out_dtype", "residual_dtype"):
        with pytest.raises(TypeError, match=option):
            function(rows(3, 8), rows(3, 8), **{option: torch.float16})
