# SPDX-License-Identifier: Apache-2.0
"""Calls like one before, from within compiled graphs: they go past torch's dispatcher, as those of the public functions do.

The dispatcher converts all arguments of an operator, and again for an implementation in Python, which takes longer than all
that is left to do then. The guard of a prepared call sees what the dispatcher would look at, as it does in eager code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.autograd import forward_ad, profiler

from . import prepared
from .library import FORWARD, Results, known


def install() -> None:
    """Have the operators for forward passes look for a prepared call first."""
    for name in FORWARD.keys() - {"norm"}:
        overload = getattr(torch.ops.normkit, name).default
        # what calling an overload calls; private to torch, and without it the operators do as they did
        if hasattr(overload, "_op"):
            _, results, needs_grad = FORWARD[name]
            overload._op = _past(overload._op, results, needs_grad)


def _past(dispatcher: Callable[..., Any], results: Results, needs_grad: bool) -> Callable[..., Any]:
    def call(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        function: str,
        eps: float,
        weight_offset: float,
    ) -> Any:
        # What sees operators, and has no dispatch key that the guard would look at, is to see them; and statistics are
        # computed for autograd, which is then not to ask.
        if not (
            profiler._is_profiler_enabled
            or _len_torch_function_stack()
            or forward_ad._current_level >= 0
            or (needs_grad and torch.is_grad_enabled())
        ):
            try:
                like_before = known(function, eps, weight_offset, needs_grad)
            except (AttributeError, TypeError):  # not a type of the schema, as the dispatcher will say
                made = None
            else:
                made = prepared.again(like_before, (x, residual, weight, bias, None, None))
            if made is not None:
                return results(x, made)
        return dispatcher(x, residual, weight, bias, function, eps, weight_offset)

    return call
