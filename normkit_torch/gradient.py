# SPDX-License-Identifier: Apache-2.0
"""What autograd sees: results with the backward pass attached, gradients with that of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit import reference
from normkit.call import Arrays, Call
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import Problem

from . import dispatch, prepared, transforms
from .guarded import Results
from .library import gradient_arguments


def norm(call: Call) -> Forward:
    """Compute a functional call of plain tensors, one of which requires a gradient."""
    with torch.no_grad():
        computed = dispatch.forward(call, needs_grad=True)
    _, tensors, options = call.parts()
    made = attached((*computed, dispatch.problem_of(call, needs_grad=True)), tensors, options[-1])
    return Forward(*made[:4])


def attached(made: Results, tensors: Arrays, implementation: str | None) -> Results:
    """Return the results of a forward pass with its backward pass attached to y and residual_out."""
    y, residual_out = NormkitNorm.apply(made, implementation, *tensors[:4])  # type: ignore[no-untyped-call]
    return y, residual_out, *made[2:]


# torch shows these names: in profiles, in errors and where a tensor is printed
class NormkitNorm(torch.autograd.Function):
    """The norm, computed before by a kernel or an operator."""

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
        """Keep what the backward pass needs."""
        y, residual_out, mean, rstd, ctx.problem = made
        ctx.implementation = implementation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual_out is None else residual_out, weight, mean, rstd)
        _, _, of_x, of_residual, _, _ = ctx.needs_input_grad
        if residual_out is not None and not (of_x or of_residual):
            ctx.mark_non_differentiable(residual_out)
        return y, residual_out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, residual, weight and bias: at once, or by the operator where torch has to see it."""
        problem, implementation, asked = ctx.problem, ctx.implementation, ctx.needs_input_grad
        h, weight, mean, rstd = ctx.saved_tensors
        wanted = Wanted.by(problem, *asked[2:])
        if not (is_dynamo_compiling() or torch.is_grad_enabled() or transforms.active()) and type(dy) is Tensor:
            known_as = problem, implementation, asked
            tensors = dy, dresidual_out, h, weight, mean, rstd
            # a dispatch mode, and what else there may be, the guard of a prepared pass sees
            made = prepared.backward(known_as, tensors)
            if made is not None:
                return None, None, *made[:4]
            if dispatch.is_plain(dy, dresidual_out, h, weight, rstd):
                found = dispatch.backward(problem, wanted, *tensors, implementation, known_as)
                return None, None, *found.by_operand(problem)
        if dy is None:
            gradients = _passed_on(problem, wanted, dresidual_out)
        else:
            rest = gradient_arguments(problem, wanted, implementation)
            results = torch.ops.normkit.norm_backward(dy, dresidual_out, h, weight, mean, rstd, *rest)
            gradients = Gradients(*(result if given else None for result, given in zip(results, wanted, strict=True)))
        return None, None, *gradients.by_operand(problem)


def _passed_on(problem: Problem, wanted: Wanted, dresidual_out: Tensor | None) -> Gradients:
    """Return the gradients where only residual_out has one: it goes straight to x and residual."""
    if dresidual_out is None:
        return Gradients(None, None, None, None)
    dtypes = ((wanted.dx, problem.x_dtype), (wanted.dresidual, problem.residual_dtype))
    dx, dresidual = (dresidual_out.to(getattr(torch, str(dtype))) if asked else None for asked, dtype in dtypes)
    return Gradients(dx, dresidual, None, None)


class NormkitGradient(torch.autograd.Function):
    """The norm's gradients, computed before; the rows are dy, dresidual_out, h and weight."""

    @staticmethod
    def forward(ctx: Any, made: Gradients, problem: Problem, wanted: Wanted, *rows: Tensor | None) -> Gradients:
        """Keep what the backward pass needs."""
        ctx.save_for_backward(*rows)
        ctx.problem, ctx.wanted = problem, wanted
        return made

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the gradient: that of the reference, which is made of differentiable operations."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that differentiation stops here and does not go on from dy to the weight that y was made with
            inputs: list[Any] = [tensor if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            gradients = reference.backward(ctx.problem, ctx.wanted, *inputs)
        asked = {index: inputs[index] for index, needed in enumerate(ctx.needs_input_grad[3:]) if needed}
        outputs, grads = [], []
        for gradient, dt in zip(gradients, cotangents, strict=True):
            if gradient is not None and gradient.requires_grad:
                outputs.append(gradient)
                grads.append(dt)
        found: tuple[Tensor | None, ...] = (None,) * len(asked)
        if outputs:
            found = torch.autograd.grad(outputs, list(asked.values()), grads, create_graph=create_graph, allow_unused=True)
        by_index = dict(zip(asked, found, strict=True))
        return None, None, None, *(by_index.get(index) for index in range(4))
