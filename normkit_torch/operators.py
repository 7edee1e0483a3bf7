# SPDX-License-Identifier: Apache-2.0
"""Calls through the operators of `library.py`, and the operators' derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit import reference, registry
from normkit.call import Call
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import NormSpec, Problem

from . import dispatch, shortcut
from .implementations import TABLE
from .library import LIBRARY, arguments_of, call_of, filled, gradient_arguments, gradient_problem, hands_on
from .memory import check_writes

_HAVE_MEMORY = (Tensor, torch.nn.Parameter)


def norm(call: Call, needs_grad: bool) -> Any:
    """Compute a functional call through an operator; tensors to write to are copied into."""
    arguments = _arguments(call)
    if call.writes:
        call.check_outputs(dispatch.operand)
        # what memory a compiler's tensors and subclasses have cannot be seen; no input is lost, as copying comes last
        if not torch.compiler.is_compiling() and all(
            type(tensor) in _HAVE_MEMORY for tensor in (*call.arrays.values(), *call.outputs.values())
        ):
            check_writes(call)
    residual_out = None
    if needs_grad:
        y, made = torch.ops.normkit.norm(*arguments)
        residual_out = made if hands_on(call) else None
    elif hands_on(call):
        y, residual_out = torch.ops.normkit.norm_and_residual(*arguments)
    else:
        y = torch.ops.normkit.norm_alone(*arguments)
    return call.result(call.written(Forward(y, residual_out, None, None)))


def norm_(call: Call) -> Any:
    """Compute an in-place call through the operator."""
    torch.ops.normkit.norm_(*_arguments(call))
    return call.x, call.residual


def _arguments(call: Call) -> tuple[Any, ...]:
    for name, tensor in call.arrays.items():
        dispatch.operand(name, tensor)
    if not torch.compiler.is_compiling():
        # what the operator's schema would refuse with an error of its own
        NormSpec(call.kind, call.eps, call.weight_offset, call.rounding)
        if call.implementation is not None:
            registry.find(TABLE, call.implementation)
    return arguments_of(call)


def backward(
    problem: Problem,
    implementation: str | None,
    wanted: Wanted,
    dy: Tensor | None,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, residual, weight and bias through the operator, where y or residual_out has one."""
    if problem.residual_out_dtype is None:
        dresidual_out = None
    if dy is None:
        return _passed_on(problem, wanted, dresidual_out).by_operand(problem)
    rest = gradient_arguments(problem, wanted, implementation)
    results = torch.ops.normkit.norm_backward(dy, dresidual_out, h, weight, mean, rstd, *rest)
    gradients = Gradients(*(result if asked else None for result, asked in zip(results, wanted, strict=True)))
    return gradients.by_operand(problem)


def _passed_on(problem: Problem, wanted: Wanted, dresidual_out: Tensor | None) -> Gradients:
    """Return the gradients where only residual_out has one: it goes straight to x and residual."""
    if dresidual_out is None:
        return Gradients(None, None, None, None)
    dtypes = ((wanted.dx, problem.x_dtype), (wanted.dresidual, problem.residual_dtype))
    dx, dresidual = (dresidual_out.to(getattr(torch, str(dtype))) if asked else None for asked, dtype in dtypes)
    return Gradients(dx, dresidual, None, None)


def _below(keyset: Any, operator: Any, *arguments: Any) -> Any:
    """Call an operator as the one that autograd has just seen, with its dispatch keys."""
    with torch._C._AutoDispatchBelowAutograd():
        return _past_autograd(keyset, operator, *arguments)


def _past_autograd(keyset: Any, operator: Any, *arguments: Any) -> Any:
    """Do so without a word to what it calls in turn: what it prepares is then prepared for calls from outside as well."""
    return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _needs_grad(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in arguments)


def _norm(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    if _needs_grad(arguments):
        return filled(arguments[0], _Norm.apply(keyset, *arguments))  # type: ignore[no-untyped-call]
    if hands_on(call_of(*arguments)):
        return tuple(_below(keyset, torch.ops.normkit.norm_and_residual.default, *arguments))
    return filled(arguments[0], (_below(keyset, torch.ops.normkit.norm_alone.default, *arguments), None))


def _norm_alone(keyset: Any, *arguments: Any) -> Tensor:
    if _needs_grad(arguments):  # as in a graph of inference that runs where gradients are asked for
        y: Tensor = _Norm.apply(keyset, *arguments)[0]  # type: ignore[no-untyped-call]
        return y
    found: Tensor = _past_autograd(keyset, torch.ops.normkit.norm_alone.default, *arguments)
    return found


def _norm_and_residual(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    if _needs_grad(arguments):
        return tuple(_Norm.apply(keyset, *arguments))  # type: ignore[no-untyped-call]
    return tuple(_past_autograd(keyset, torch.ops.normkit.norm_and_residual.default, *arguments))


def _norm_backward(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    if _needs_grad(arguments):
        return filled(arguments[2], _NormBackward.apply(keyset, *arguments))  # type: ignore[no-untyped-call]
    return filled(arguments[2], _gradients_below(keyset, arguments))


def _gradients_below(keyset: Any, arguments: tuple[Any, ...]) -> Gradients:
    found = iter(_below(keyset, torch.ops.normkit.norm_gradients.default, *arguments))
    return Gradients(*(next(found) if asked else None for asked in arguments[-1]))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        call = call_of(*arguments)
        y, *rest = _below(keyset, torch.ops.normkit.norm_and_statistics.default, *arguments)
        problem = call.problem(dispatch.operand)
        residual_out = rest.pop(0) if problem.residual_out_dtype else None
        mean = rest.pop(0) if problem.spec.subtract_mean else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.x if residual_out is None else residual_out, call.weight, mean, *rest)
        ctx.problem, ctx.implementation = problem, call.implementation
        return y, residual_out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = Wanted.by(ctx.problem, *ctx.needs_input_grad[1:5])
        gradients = backward(ctx.problem, ctx.implementation, wanted, dy, dresidual_out, *ctx.saved_tensors)
        return None, *gradients, None, None, None


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Gradients:
        dy, dresidual_out, h, weight, _, _, *spec, wanted = arguments
        ctx.save_for_backward(dy, dresidual_out, h, weight)
        ctx.problem, ctx.wanted = gradient_problem(dy, h, weight, *spec), Wanted(*wanted)
        return _gradients_below(keyset, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the gradient: that of the reference, which is made of differentiable operations."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that differentiation stops here and does not go on from dy to the weight that y was made with
            inputs: list[Any] = [tensor if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            gradients = reference.backward(ctx.problem, ctx.wanted, *inputs)
        asked = {index: inputs[index] for index, needed in enumerate(ctx.needs_input_grad[1:5]) if needed}
        made = zip(gradients, cotangents, strict=True)
        outputs, grads = [], []
        for gradient, dt in made:
            if gradient is not None and gradient.requires_grad:
                outputs.append(gradient)
                grads.append(dt)
        found: tuple[Tensor | None, ...] = (None,) * len(asked)
        if outputs:
            found = torch.autograd.grad(outputs, list(asked.values()), grads, create_graph=create_graph, allow_unused=True)
        by_index = dict(zip(asked, found, strict=True))
        return None, *(by_index.get(index) for index in range(4)), *(None,) * 6


for _name, _differentiable in (
    ("norm", _norm),
    ("norm_alone", _norm_alone),
    ("norm_and_residual", _norm_and_residual),
    ("norm_backward", _norm_backward),
):
    LIBRARY.impl(_name, _differentiable, "Autograd", with_keyset=True)
shortcut.install()
