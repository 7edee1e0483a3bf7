# SPDX-License-Identifier: Apache-2.0
"""Rows do not know of one another: a row's bits are the same alone and in any company; what is not finite stays in its row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normkit_torch

# several rows in a program, one row in a program, and a row in several blocks (forward, and backward)
HIDDEN_SIZES = [31, 256, 4096, 17000]
EVERY_KERNEL = pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
BOTH_KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
ROWS = 4


def _inputs(hidden_size: int, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(hidden_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (rows, hidden_size)
    return {
        "x": normal(*shape),
        "residual": normal(*shape).to(torch.bfloat16),
        "weight": normal(hidden_size),
        "bias": normal(hidden_size),
        "dy": normal(*shape),
        "dresidual_out": normal(*shape).to(torch.bfloat16),
    }


def _compute(kind: str, inputs: dict[str, Tensor], rows: Any = slice(None)) -> dict[str, Tensor]:
    """Return all results of the rows asked for, forward and backward."""
    names = ("x", "residual", "weight", "bias")
    own = {name: tensor[rows] if tensor.ndim > 1 else tensor for name, tensor in inputs.items()}
    leaves = {name: own[name].detach().clone().requires_grad_() for name in names}
    y, residual_out = getattr(normkit_torch, f"add_{kind}_norm")(**leaves, implementation="triton")
    gradients = torch.autograd.grad((y, residual_out), list(leaves.values()), (own["dy"], own["dresidual_out"]))
    results = {"y": y, "residual_out": residual_out}
    return results | dict(zip(("dx", "dresidual", "dweight", "dbias"), gradients, strict=True))


PER_ROW = ("y", "residual_out", "dx", "dresidual")


@EVERY_KERNEL
@BOTH_KINDS
def test_a_row_has_the_same_bits_in_any_company(kind: str, hidden_size: int) -> None:
    inputs = _inputs(hidden_size)
    together = _compute(kind, inputs)
    for rows in ([2], [3, 2, 0, 1]):
        apart = _compute(kind, inputs, rows)
        for name in PER_ROW:
            assert torch.equal(apart[name], together[name][rows]), (name, rows)


@EVERY_KERNEL
def test_weight_gradients_are_the_same_bits_in_every_run(hidden_size: int) -> None:
    first, second = (_compute("layer", _inputs(hidden_size)) for _ in range(2))
    assert torch.equal(first["dweight"], second["dweight"])
    assert torch.equal(first["dbias"], second["dbias"])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@EVERY_KERNEL
@BOTH_KINDS
def test_what_is_not_finite_stays_in_its_row(kind: str, hidden_size: int, value: float) -> None:
    inputs = _inputs(hidden_size)
    clean = _compute(kind, inputs)
    inputs["x"][2, hidden_size // 2] = value
    with np.errstate(invalid="ignore"):
        dirty = _compute(kind, inputs)
    others = [row for row in range(ROWS) if row != 2]
    for name in PER_ROW:
        assert torch.equal(dirty[name][others], clean[name][others]), name
    names = ("x", "residual", "weight", "bias")
    reference = getattr(normkit_torch, f"add_{kind}_norm")(
        *(inputs[name][2] if inputs[name].ndim > 1 else inputs[name] for name in names), implementation="reference"
    )
    for name, expected in zip(("y", "residual_out"), reference, strict=True):
        assert torch.equal(dirty[name][2].isnan(), expected.isnan()), name
    assert np.isinf(value) or not dirty["dweight"].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (0, 20000)], ids=str)
@BOTH_KINDS
def test_without_rows_gradients_of_parameters_are_zero(kind: str, shape: tuple[int, ...]) -> None:
    inputs = _inputs(shape[-1])
    for name, dtype in (("x", None), ("residual", torch.bfloat16), ("dy", None), ("dresidual_out", torch.bfloat16)):
        inputs[name] = torch.empty(shape, dtype=dtype)
    results = _compute(kind, inputs)
    assert results["y"].shape == results["residual_out"].shape == results["dx"].shape == shape
    assert torch.equal(results["dweight"], torch.zeros(shape[-1]))
    assert torch.equal(results["dbias"], torch.zeros(shape[-1]))


@BOTH_KINDS
def test_in_place_without_rows(kind: str) -> None:
    x, residual = torch.empty(0, 64), torch.empty(0, 64)
    assert getattr(normkit_torch, f"add_{kind}_norm_")(x, residual, implementation="triton")[0] is x
