# SPDX-License-Identifier: Apache-2.0
"""Calls like one before, from within compiled graphs: they go past torch's dispatcher, as those of the public functions do.

The dispatcher converts all arguments of an operator, and again for an implementation in Python, which takes longer than all
that is left to do then. The guard of a prepared call sees what the dispatcher would look at, as it does in eager code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.autograd import forward_ad, profiler

from . import prepared
from .library import FORWARD, Results, gradients_again, known, known_gradients, known_in_place, there

_Call = Callable[..., Any]


def install() -> None:
    """Have the operators look for a prepared call first, but those that are others once autograd has seen them."""
    past: dict[str, Callable[[_Call], _Call]] = {
        name: partial(_forward, results, needs_grad) for name, (_, results, needs_grad) in FORWARD.items() if name != "norm"
    }
    past |= {"norm_": _in_place, "norm_gradients": _gradients}
    for name, way in past.items():
        overload = getattr(torch.ops.normkit, name).default
        # what calling an overload calls; private to torch, and without it the operators do as they did
        if hasattr(overload, "_op"):
            overload._op = way(overload._op)


def _looked_at() -> bool:
    """Whether something is to see operators that has no dispatch key, which the guard would look at."""
    return profiler._is_profiler_enabled or bool(_len_torch_function_stack()) or forward_ad._current_level >= 0


def _forward(results: Results, needs_grad: bool, dispatcher: _Call) -> _Call:
    def call(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        function: str,
        eps: float,
        weight_offset: float,
    ) -> Any:
        # statistics are computed for autograd, which is then not to ask
        if not (_looked_at() or (needs_grad and torch.is_grad_enabled())):
            try:
                known_as = known(function, eps, weight_offset, needs_grad)
            except (AttributeError, TypeError):  # not a type of the schema, as the dispatcher will say
                made = None
            else:
                made = prepared.again(known_as, (x, residual, weight, bias, None, None))
            if made is not None:
                return results(x, made)
        return dispatcher(x, residual, weight, bias, function, eps, weight_offset)

    return call


def _in_place(dispatcher: _Call) -> _Call:
    def call(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        function: str,
        eps: float,
        weight_offset: float,
    ) -> None:
        if not _looked_at():
            try:
                known_as = known_in_place(x, residual, function, eps, weight_offset)
            except (AttributeError, TypeError):
                pass
            else:
                if prepared.again(known_as, (x, residual, weight, bias, None, None)) is not None:
                    return
        dispatcher(x, residual, weight, bias, function, eps, weight_offset)

    return call


def _gradients(dispatcher: _Call) -> _Call:
    def call(
        dy: Tensor,
        dresidual_out: Tensor | None,
        h: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        kind: str,
        eps: float,
        weight_offset: float,
        wanted: list[bool],
    ) -> Any:
        tensors = dy, dresidual_out, h, weight, mean, rstd
        if not (_looked_at() or torch.is_grad_enabled()):
            try:
                known_as = known_gradients(h, kind, eps, weight_offset, wanted)
                hash(known_as)  # a size that is a symbol has none
            except (AttributeError, TypeError):
                made = None
            else:
                made = gradients_again(known_as, tensors, wanted)
            if made is not None:
                return there(made)
        return dispatcher(*tensors, kind, eps, weight_offset, wanted)

    return call
