# SPDX-License-Identifier: Apache-2.0
"""What torch follows a call with besides computing it: gradients, tangents, batches; and what is refused for that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from normkit import reference
from normkit.call import Call
from normkit.errors import OptionError, UnsupportedError
from normkit.interface import Forward

from . import dispatch

WHY = "under torch.func transforms and forward-mode differentiation"


def needs_grad(*tensors: Any) -> bool:
    """Whether autograd will want a backward pass of what is computed from these."""
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def gradient_lost(call: Call) -> OptionError:
    """Return what to raise for a call that writes to tensors and that a gradient is asked of."""
    if call.function.endswith("_"):
        return OptionError(
            f"{call.function} overwrites its inputs, and one of them requires a gradient: "
            f"use {call.function[:-1]}, or torch.no_grad()"
        )
    asking = [name for name, tensor in (call.arrays | call.outputs).items() if getattr(tensor, "requires_grad", False)]
    return OptionError(
        f"gradients do not flow through tensors that are written to, and {', '.join(asking)} requires one: "
        f"do without {_outputs(call)}, or use torch.no_grad()"
    )


def _outputs(call: Call) -> str:
    return " and ".join(f"{name}=" for name in call.outputs)


def active() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, for which a kernel has no rule."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def forward(call: Call) -> Forward:
    """Compute by the reference, whose operations have vmap and forward-mode rules; an operator has neither.

    Raises:
        UnsupportedError: the call writes to tensors, or asks for another implementation.
    """
    if call.writes or call.implementation not in (None, "reference"):
        in_place = call.function.endswith("_")
        asked = call.function if in_place else _outputs(call) or f"implementation={call.implementation!r}"
        raise UnsupportedError(f"{asked} cannot be used {WHY}: they take the reference")
    problem = call.problem(dispatch.operand, needs_grad=True)
    return reference.forward(problem, call.x, call.residual, call.weight, call.bias)
