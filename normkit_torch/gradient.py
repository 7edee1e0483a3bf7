# SPDX-License-Identifier: Apache-2.0
"""The norm with its own gradient in plain eager code: what autograd sees where no tracer has to see an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.call import Call, Options
from normkit.interface import Forward, Wanted

from . import dispatch, operators, prepared


def norm(call: Call) -> Any:
    """Compute a functional call of plain tensors, one of which requires a gradient."""
    function, (x, residual, weight, bias, *_), options = call.parts()
    y, residual_out = _Norm.apply(function, options, x, residual, weight, bias)  # type: ignore[no-untyped-call]
    return call.result(Forward(y, residual_out, None, None))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: str,
        options: Options,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        tensors = (x, residual, weight, bias, None, None)
        made = prepared.forward(function, tensors, options, needs_grad=True)
        if made is None:
            call = Call.of(function, tensors, options)
            made = *dispatch.forward(call, needs_grad=True), dispatch.problem_of(call, needs_grad=True)
        y, residual_out, mean, rstd, ctx.problem = made
        ctx.implementation = options[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual_out is None else residual_out, weight, mean, rstd)
        return y, residual_out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None) -> tuple[Tensor | None, ...]:
        problem, (h, weight, mean, rstd) = ctx.problem, ctx.saved_tensors
        wanted = Wanted.by(problem, *ctx.needs_input_grad[2:])
        if torch.is_grad_enabled() or dy is None or not dispatch.is_plain(dy, dresidual_out, h, weight, rstd):
            gradients = operators.backward(problem, ctx.implementation, wanted, dy, dresidual_out, h, weight, mean, rstd)
        else:
            handed_on = None if problem.residual_out_dtype is None else dresidual_out
            made = dispatch.backward(problem, wanted, dy, handed_on, h, weight, mean, rstd, ctx.implementation)
            gradients = made.by_operand(problem)
        return None, None, *gradients
