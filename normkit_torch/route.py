# SPDX-License-Identifier: Apache-2.0
"""Which way a call goes: at once in plain eager code, through an operator, or through the reference's own operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit import reference
from normkit.call import Call
from normkit.errors import OptionError, UnsupportedError

from . import dispatch, operators


def compute(call: Call) -> Any:
    """Compute a call: at once in plain eager code, through the operators where autograd or a tracer must see it."""
    grad = needs_grad(call)
    in_place = call.function.endswith("_")
    if in_place and grad:
        raise OptionError(
            f"{call.function} overwrites its inputs, and one of them requires a gradient: "
            f"use {call.function[:-1]}, or torch.no_grad()"
        )
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _under_transform(call, in_place)
    if grad or not _is_plain(call):
        return operators.norm_(call) if in_place else operators.norm(call, grad)
    if not in_place:
        return call.result(dispatch.forward(call, needs_grad=False))
    dispatch.forward_(call)
    return call.x, call.residual


def _under_transform(call: Call, in_place: bool) -> Any:
    """Compute by the reference, whose operations have vmap and forward-mode rules; an operator has neither."""
    if in_place or call.implementation not in (None, "reference"):
        asked = call.function if in_place else f"implementation={call.implementation!r}"
        raise UnsupportedError(
            f"{asked} cannot be used under torch.func transforms and forward-mode differentiation: they take the reference"
        )
    problem = call.problem(dispatch.operand)
    return call.result(reference.forward(problem, call.x, call.residual, call.weight, call.bias))


def needs_grad(call: Call) -> bool:
    """Whether autograd will want a backward pass of this call."""
    return torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (call.x, call.residual, call.weight, call.bias)
    )


def _is_plain(call: Call) -> bool:
    """Whether nothing but this function needs to know of the call: no tracer, no dispatch mode, no subclass, no lazy sign."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(
            type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_neg()
            for tensor in (call.x, call.residual, call.weight, call.bias)
            if tensor is not None
        )
    )
