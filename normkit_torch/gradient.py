# SPDX-License-Identifier: Apache-2.0
"""The norm with its own gradient in plain eager code: what autograd sees where no tracer has to see an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit.call import Arrays, Call
from normkit.interface import Forward, Wanted

from . import dispatch, operators, prepared
from .guarded import Results


def norm(call: Call) -> Forward:
    """Compute a functional call of plain tensors, one of which requires a gradient."""
    with torch.no_grad():
        computed = dispatch.forward(call, needs_grad=True)
    _, tensors, options = call.parts()
    made = attached((*computed, dispatch.problem_of(call, needs_grad=True)), tensors, options[-1])
    return Forward(*made[:4])


def attached(made: Results, tensors: Arrays, implementation: str | None) -> Results:
    """Return the results of a forward pass with its backward pass attached to y and residual_out."""
    y, residual_out = _Norm.apply(made, implementation, *tensors[:4])  # type: ignore[no-untyped-call]
    return y, residual_out, *made[2:]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        made: Results,
        implementation: str | None,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, residual_out, mean, rstd, ctx.problem = made
        ctx.implementation = implementation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual_out is None else residual_out, weight, mean, rstd)
        return y, residual_out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None) -> tuple[Tensor | None, ...]:
        problem, implementation, asked = ctx.problem, ctx.implementation, ctx.needs_input_grad
        h, weight, mean, rstd = ctx.saved_tensors
        known_as = problem, implementation, asked
        # a dispatch mode, and what else there may be, the guard of a prepared pass sees
        if not (torch.is_grad_enabled() or is_dynamo_compiling()):
            made = prepared.backward(known_as, (dy, dresidual_out, h, weight, mean, rstd))
            if made is not None:
                return None, None, *made[:4]
        wanted = Wanted.by(problem, *asked[2:])
        if torch.is_grad_enabled() or dy is None or not dispatch.is_plain(dy, dresidual_out, h, weight, rstd):
            gradients = operators.backward(problem, implementation, wanted, dy, dresidual_out, h, weight, mean, rstd)
        else:
            handed_on = None if problem.residual_out_dtype is None else dresidual_out
            found = dispatch.backward(problem, wanted, dy, handed_on, h, weight, mean, rstd, implementation, known_as)
            gradients = found.by_operand(problem)
        return None, None, *gradients
