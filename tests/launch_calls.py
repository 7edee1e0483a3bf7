# SPDX-License-Identifier: Apache-2.0
"""Calls of every kind, for tests of what reaches the driver: each with a number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normkit_torch

HIDDEN = 256
BF16 = torch.bfloat16


def rows(count: int, misaligned: bool = False, hidden: int = HIDDEN, dtype: torch.dtype = BF16) -> Tensor:
    flat = torch.ones(count * hidden + 16, dtype=dtype)
    start = -flat.data_ptr() % 16 // flat.itemsize + misaligned
    return flat[start : start + count * hidden].view(count, hidden)


def parameter(hidden: int = HIDDEN, misaligned: bool = False) -> Tensor:
    return rows(1, misaligned, hidden)[0]


def in_place(count: int = 8) -> None:
    normkit_torch.add_rms_norm_(rows(count), rows(count), parameter())


def functional(count: int = 8) -> None:
    normkit_torch.add_layer_norm(rows(count), rows(count), parameter(), parameter())


def into(count: int = 8) -> None:
    normkit_torch.add_rms_norm(rows(count), rows(count), out=rows(count), residual_out=rows(count))


def strided(count: int = 8) -> None:
    normkit_torch.rms_norm(rows(count, hidden=HIDDEN + 16)[:, :HIDDEN], parameter())


def gradient(count: int = 8, hidden: int = HIDDEN) -> None:
    leaves = [rows(count, hidden=hidden).requires_grad_() for _ in range(2)] + [parameter(hidden).requires_grad_()]
    y, residual_out = normkit_torch.add_rms_norm(*leaves)
    cotangents = [rows(count, hidden=hidden) for _ in range(2)]
    torch.autograd.grad((y, residual_out), leaves, cotangents)


def long_gradient(count: int = 8) -> None:
    gradient(count, hidden=20000)


CALLS = (in_place, functional, into, strided, gradient, long_gradient)
EACH = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
