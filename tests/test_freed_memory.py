# SPDX-License-Identifier: Apache-2.0
"""A tensor whose memory was freed, as parameters are while sharded or offloaded, is refused by its name wherever it comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from normkit import OptionError

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import normkit_torch

from . import test_errors
from .test_prepared import _nothing_prepared, rows

__all__ = ["_nothing_prepared"]  # the fixture

NAMES = ("x", "residual", "weight", "bias", "out", "residual_out")
TIMES = pytest.mark.parametrize("times", [0, 1], ids=["cold", "prepared"])
EACH = pytest.mark.parametrize("function", [*test_errors.FUNCTIONS, *test_errors.IN_PLACE])


def freed(tensor: Tensor) -> Tensor:
    """Free a tensor's memory, as FSDP frees that of parameters."""
    tensor.untyped_storage().resize_(0)
    return tensor


def refused(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match=rf"^{name} has shape .* and no memory, .* gather or load it before the call$"):
        call()


def tensors_of(function: str) -> dict[str, Tensor]:
    """All the tensors that a function takes."""
    shapes = {name: (8,) if name in NAMES[2:4] else (3, 8) for name in NAMES}
    tensors = {name: rows(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    adds, in_place = function.startswith("add_"), function.endswith("_")
    without = [*([] if adds else ["residual", "residual_out"]), *(["out", "residual_out"] if in_place else [])]
    return {name: tensor for name, tensor in tensors.items() if name not in without}


def compute(function: str, tensors: dict[str, Tensor], **options: Any) -> Any:
    return getattr(normkit_torch, function)(**tensors, **options)


@EACH
@TIMES
@pytest.mark.parametrize("implementation", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_each_operand(name: str, implementation: str | None, times: int, function: str) -> None:
    tensors, options = tensors_of(function), {"implementation": implementation}
    if name not in tensors:
        return
    for _ in range(times):
        compute(function, tensors_of(function), **options)
    before = {other: tensor.clone() for other, tensor in tensors.items() if other != name}
    freed(tensors[name])
    for _ in range(2):
        refused(name, lambda: compute(function, tensors, **options))
    for other, tensor in before.items():
        assert torch.equal(tensors[other], tensor), "nothing was written"
    # with its memory it is the operand that it was, and the other operands say the same of themselves
    tensors[name].untyped_storage().resize_(tensors[name].nbytes)
    tensors[name].copy_(tensors_of(function)[name])
    expected = compute(function, tensors_of(function), **options)
    torch.testing.assert_close(compute(function, tensors, **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_memory_that_was_freed(name: str) -> None:
    """Its address is not 0. A prepared call, which looks at no more than that, would read there, as torch does."""
    tensors = tensors_of("add_rms_norm")
    flat = torch.zeros(24 + tensors[name].numel())
    tensors[name] = flat[24:].view(tensors[name].shape)
    freed(flat)
    refused(name, lambda: compute("add_rms_norm", tensors))


@TIMES
@pytest.mark.parametrize("within", [FlopCounterMode, torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", NAMES[:4])
def test_through_an_operator_and_within_modes(name: str, within: Any, times: int) -> None:
    tensors = tensors_of("add_layer_norm")
    tensors = {name: tensors[name] for name in NAMES[:4]}

    def call() -> Any:
        with within(display=False) if within is FlopCounterMode else within():
            return compute("add_layer_norm", tensors)

    for _ in range(times):
        call()
    freed(tensors[name])
    refused(name, call)
    overload = torch.ops.normkit.norm_and_residual.default
    refused(name, lambda: overload(*tensors.values(), "add_layer_norm", 1e-5, 0.0))


SAVED = {"dy": (), "dresidual_out": (), "h": (3, 8), "weight": (8,), "mean": (3,), "rstd": (3,)}


@TIMES
@pytest.mark.parametrize("name", SAVED)
def test_the_backward_pass(name: str, times: int) -> None:
    def gradients(free: bool = True) -> Any:
        leaves = [tensor.requires_grad_() for tensor in list(tensors_of("add_layer_norm").values())[:4]]
        saved: list[Tensor] = []

        def unpack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            # the second one of this shape is rstd
            is_it = tensor.shape == SAVED[name] and (name != "rstd" or len(saved) == len(SAVED) - 2)
            return freed(tensor.detach().clone()) if free and is_it else tensor

        with saved_tensors_hooks(lambda tensor: tensor, unpack):
            results = normkit_torch.add_layer_norm(*leaves)
        dys = {"dy": rows(3, 8, seed=7), "dresidual_out": rows(3, 8, seed=8)}
        if free and name in dys:
            freed(dys[name])
        return torch.autograd.grad(results, leaves, tuple(dys.values()))

    for _ in range(times):
        gradients(free=False)
    refused(name, gradients)


@TIMES
@pytest.mark.parametrize("name", ["h", "weight"])
def test_parameters_that_are_freed_between_the_passes(name: str, times: int) -> None:
    for _ in range(times):
        x, weight = rows(3, 8).requires_grad_(), rows(8).requires_grad_()
        torch.autograd.grad(normkit_torch.rms_norm(x, weight), (x, weight), rows(3, 8))
    x, weight = rows(3, 8).requires_grad_(), rows(8).requires_grad_()
    y = normkit_torch.rms_norm(x, weight)
    freed({"h": x, "weight": weight}[name])
    refused(name, partial(torch.autograd.grad, y, (x, weight), rows(3, 8)))


def test_what_has_no_elements_or_no_memory_of_its_own_is_computed() -> None:
    empty = freed(torch.ones(0, 8))
    assert normkit_torch.rms_norm(empty, rows(8)).shape == (0, 8)
    meta = torch.ones(3, 8, device="meta")
    assert normkit_torch.add_rms_norm(meta, meta, meta[0])[0].shape == (3, 8)
