# SPDX-License-Identifier: Apache-2.0
"""Which way a call goes: at once in plain eager code, through an operator, or through the reference's own operations."""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import forward_ad, profiler
from torch.compiler import is_dynamo_compiling

from normkit.call import FUNCTIONS, Arrays, Call, Options

from . import dispatch, gradient, operators, prepared, transforms

_WITHOUT_RESIDUAL = frozenset(name for name in FUNCTIONS if not name.startswith("add_"))


def compute(function: str, tensors: Arrays, options: Options) -> Any:
    """Compute a call: at once if one like it was computed before.

    Args:
        function: as in `normkit.call.Call`.
        tensors: x, residual, weight, bias, out and residual_out.
        options: eps and all that follow.
    """
    if profiler._is_profiler_enabled and not is_dynamo_compiling():
        with _RecordFunctionFast(f"normkit::{function}"):
            return _computed(function, tensors, options)
    return _computed(function, tensors, options)


# what torch.compile could not compile as a whole it compiles frame by frame, for which it hides transforms: not these
set_code_exec_strategy(compute.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _computed(function: str, tensors: Arrays, options: Options) -> Any:
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
    tensors = call.parts()[1]
    grad = transforms.needs_grad(*tensors)
    if grad and call.writes:
        raise transforms.gradient_lost(call)
    if transforms.active():
        return call.result(transforms.forward(call))
    plain = dispatch.is_plain(*tensors)
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
