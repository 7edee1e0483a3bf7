# SPDX-License-Identifier: Apache-2.0
"""Calls like one before, from within compiled graphs: they go past torch's dispatcher, as those of the public functions do.

The dispatcher converts all arguments of an operator, and again for an implementation in Python, which takes longer than all
that is left to do then. The guard of a prepared call sees what the dispatcher would look at, as it does in eager code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from . import library

_RESULTS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "norm_alone": (False, lambda made: made[0]),
    "norm_and_residual": (False, lambda made: None if made[1] is None else made[:2]),
    "norm_and_statistics": (True, lambda made: library.there(made[:4])),
}


def install() -> None:
    """Have the operators for forward passes look for a prepared call first."""
    for name, (needs_grad, results) in _RESULTS.items():
        overload = getattr(torch.ops.normkit, name).default
        # what calling an overload calls; private to torch, and without it the operators do as they did
        if hasattr(overload, "_op"):
            overload._op = _past(overload._op, needs_grad, results)


def _past(dispatcher: Callable[..., Any], needs_grad: bool, results: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        # A graph gives all seven, by position. What sees operators, and has no dispatch key that the guard would look at, is to
        # see them; and statistics are computed for autograd, which is then not to ask.
        if (
            named
            or len(arguments) != 7
            or type(arguments[4]) is not str
            or profiler._is_profiler_enabled
            or torch._C._len_torch_function_stack()
            or (needs_grad and torch.is_grad_enabled())
        ):
            return dispatcher(*arguments, **named)
        made = library.prepared_norm(needs_grad, *arguments)
        found = None if made is None else results(made)
        return dispatcher(*arguments) if found is None else found

    return call
