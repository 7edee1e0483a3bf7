# SPDX-License-Identifier: Apache-2.0
"""Calls through the operators of `library.py`, and the operators' derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit import reference, registry
from normkit.call import Call
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import NormSpec

from . import dispatch, gradient, shortcut, transforms
from .guarded import Results
from .implementations import TABLE
from .library import FORWARD, LIBRARY, arguments_of, call_of, filled, gradient_problem, hands_on, there
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


def _below(keyset: Any, operator: Any, *arguments: Any) -> Any:
    """Call an operator as the one that autograd has just seen, with its dispatch keys."""
    with torch._C._AutoDispatchBelowAutograd():
        return _past_autograd(keyset, operator, *arguments)


def _past_autograd(keyset: Any, operator: Any, *arguments: Any) -> Any:
    """Do so without a word to what it calls in turn: what it prepares is then prepared for calls from outside as well."""
    return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _followed(keyset: Any, arguments: tuple[Any, ...]) -> Forward | Results | None:
    """Return the results of a forward pass that autograd or a transform follows, None if neither does."""
    if transforms.active():
        return transforms.forward(call_of(*arguments))
    if not transforms.needs_grad(*arguments):
        return None
    call = call_of(*arguments)
    y, *rest = _below(keyset, torch.ops.normkit.norm_and_statistics.default, *arguments)
    problem = call.problem(dispatch.operand, needs_grad=True)
    residual_out = rest.pop(0) if problem.residual_out_dtype else None
    mean = rest.pop(0) if problem.spec.subtract_mean else None
    return gradient.attached((y, residual_out, mean, *rest, problem), call.parts()[1], call.implementation)


def _norm(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    made = _followed(keyset, arguments)
    if made is not None:
        return filled(arguments[0], made[:2])
    if hands_on(call_of(*arguments)):
        return tuple(_below(keyset, torch.ops.normkit.norm_and_residual.default, *arguments))
    return filled(arguments[0], (_below(keyset, torch.ops.normkit.norm_alone.default, *arguments), None))


def _like_norm(name: str) -> Callable[..., Any]:
    """Return the same for what calls of `norm` become: a graph may run where more is asked than when it was traced."""
    operator, (_, results, _) = getattr(torch.ops.normkit, name).default, FORWARD[name]

    def followed(keyset: Any, *arguments: Any) -> Any:
        made = _followed(keyset, arguments)
        return _past_autograd(keyset, operator, *arguments) if made is None else results(arguments[0], made)

    return followed


def _norm_(keyset: Any, *arguments: Any) -> None:
    if transforms.needs_grad(*arguments):
        raise transforms.gradient_lost(call_of(*arguments))
    if transforms.active():
        transforms.forward(call_of(*arguments))  # which refuses it
    _past_autograd(keyset, torch.ops.normkit.norm_.default, *arguments)


def _norm_backward(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
    return filled(arguments[2], _followed_gradients(keyset, arguments) or _gradients_below(keyset, arguments))


def _norm_gradients(keyset: Any, *arguments: Any) -> Any:
    made = _followed_gradients(keyset, arguments)
    return _past_autograd(keyset, torch.ops.normkit.norm_gradients.default, *arguments) if made is None else there(made)


def _followed_gradients(keyset: Any, arguments: tuple[Any, ...]) -> Gradients | None:
    transformed = transforms.active()
    if not (transformed or transforms.needs_grad(*arguments)):
        return None
    dy, dresidual_out, h, weight, _, _, *spec, asked = arguments
    rows, wanted, problem = (dy, dresidual_out, h, weight), Wanted(*asked), gradient_problem(dy, h, weight, *spec)
    if transformed:
        return reference.backward(problem, wanted, *rows)
    made = _gradients_below(keyset, arguments)
    return Gradients(*gradient.NormkitGradient.apply(made, problem, wanted, *rows))  # type: ignore[no-untyped-call]


def _gradients_below(keyset: Any, arguments: tuple[Any, ...]) -> Gradients:
    found = iter(_below(keyset, torch.ops.normkit.norm_gradients.default, *arguments))
    return Gradients(*(next(found) if asked else None for asked in arguments[-1]))


for _name, _differentiable in (
    ("norm", _norm),
    ("norm_alone", _like_norm("norm_alone")),
    ("norm_and_residual", _like_norm("norm_and_residual")),
    ("norm_and_statistics", _like_norm("norm_and_statistics")),
    ("norm_", _norm_),
    ("norm_backward", _norm_backward),
    ("norm_gradients", _norm_gradients),
):
    LIBRARY.impl(_name, _differentiable, "Autograd", with_keyset=True)
shortcut.install()
