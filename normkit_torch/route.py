# SPDX-License-Identifier: Apache-2.0
"""Which way a call goes: at once in plain eager code, through an operator, or through the reference's own operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from normkit import reference
from normkit.call import FUNCTIONS, Arrays, Call, Options
from normkit.errors import OptionError, UnsupportedError

from . import dispatch, gradient, operators, prepared

_WITHOUT_RESIDUAL = frozenset(name for name in FUNCTIONS if not name.startswith("add_"))


def compute(function: str, tensors: Arrays, options: Options) -> Any:
    """Compute a call: at once if one like it was computed before.

    Args:
        function: as in `normkit.call.Call`.
        tensors: x, residual, weight, bias, out and residual_out.
        options: eps and all that follow.
    """
    made = None
    # a transform that is active, and what else torch would do with the tensors, is seen by the guard of a prepared call
    if not (is_dynamo_compiling() or _len_torch_dispatch_stack() or forward_ad._current_level >= 0):
        made = prepared.forward(function, tensors, options)
        if made is None and torch.is_grad_enabled():
            made = prepared.forward(function, tensors, options, needs_grad=True)
            made = made and gradient.attached(made, tensors, options[-1])
    if made is None:
        return _compute(Call.of(function, tensors, options))
    y, residual_out, _, _, _ = made
    return y if function in _WITHOUT_RESIDUAL else (y, tensors[0] if residual_out is None else residual_out)


def _compute(call: Call) -> Any:
    """Compute a call: at once in plain eager code, through the operators where autograd or a tracer must see it."""
    grad = needs_grad(call)
    if grad and call.writes:
        raise OptionError(_gradient_lost(call))
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _under_transform(call)
    plain = dispatch.is_plain(*call.parts()[1])
    if call.function.endswith("_"):
        if not plain:
            return operators.norm_(call)
        dispatch.forward_(call)
        return call.x, call.residual
    if not plain:
        return operators.norm(call, grad)
    if grad:
        return call.result(gradient.norm(call))
    return call.result(dispatch.forward_into(call) if call.writes else dispatch.forward(call, needs_grad=False))


def _gradient_lost(call: Call) -> str:
    if call.function.endswith("_"):
        return (
            f"{call.function} overwrites its inputs, and one of them requires a gradient: "
            f"use {call.function[:-1]}, or torch.no_grad()"
        )
    asking = [name for name, tensor in (call.arrays | call.outputs).items() if getattr(tensor, "requires_grad", False)]
    return (
        f"gradients do not flow through tensors that are written to, and {', '.join(asking)} requires one: "
        f"do without {_outputs(call)}, or use torch.no_grad()"
    )


def _outputs(call: Call) -> str:
    return " and ".join(f"{name}=" for name in call.outputs)


def _under_transform(call: Call) -> Any:
    """Compute by the reference, whose operations have vmap and forward-mode rules; an operator has neither."""
    if call.writes or call.implementation not in (None, "reference"):
        in_place = call.function.endswith("_")
        asked = call.function if in_place else _outputs(call) or f"implementation={call.implementation!r}"
        raise UnsupportedError(
            f"{asked} cannot be used under torch.func transforms and forward-mode differentiation: they take the reference"
        )
    problem = call.problem(dispatch.operand)
    return call.result(reference.forward(problem, call.x, call.residual, call.weight, call.bias))


def needs_grad(call: Call) -> bool:
    """Whether autograd will want a backward pass of this call."""
    return torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad
        for tensor in (call.x, call.residual, call.weight, call.bias, call.out, call.residual_out)
    )
