# SPDX-License-Identifier: Apache-2.0
"""Calls like one before: what was chosen then is launched at once.

To validate, to describe and to choose takes many times as long as to compute a few rows. So the choice is kept, with a guard.
Whatever is not like that goes the long way, errors too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

from normkit.call import Arrays, Call, Options
from normkit.errors import LaunchError
from normkit.interface import Guarded, Kernels, Run, Wanted
from normkit.spec import Problem

from .guarded import Results, of_backward, of_forward

# calls to keep, and those among them that differ in the strides of their tensors and the like
_MOST, _MOST_ALIKE = 1024, 8


class Prepared(NamedTuple):
    """A call that was prepared.

    Attributes:
        threads: how many torch had when it was prepared.
        requires_grad: whether one of its tensors asks for a gradient.
        run: what is left to do.
        problem: the call, as it was described then.
    """

    threads: int
    requires_grad: bool
    run: Run
    problem: Problem


Known = tuple[object, ...]
"""All that decides on a call but its tensors. Of a forward pass: its function, its options, the types of the first two, as 1.0,
True and Decimal(1) are one key and not all of them are right, and whether statistics are wanted."""

# by what they are known as, and forward passes also by what is quick to look at in their tensors
_calls: dict[tuple[object, ...], tuple[Prepared, ...]] = {}
# the last one that was used, of those that are known as the same
_latest: dict[Known, Prepared] = {}


def forward(known_as: object, tensors: Arrays, options: Options, needs_grad: bool = False) -> Results | None:
    """Compute a call that was prepared, in plain eager code or within an operator; None if there is none like it.

    Args:
        known_as: the function as in `normkit.call.Call`, whose arguments need not be right; with more where the guard sees too
            little.
        tensors: those given.
        options: the others.
        needs_grad: whether the statistics are wanted.
    """
    return again(known(known_as, options, needs_grad), tensors)


def known(known_as: object, options: Options, needs_grad: bool) -> Known:
    """Return what a forward pass is known as; arguments as for `forward`."""
    return known_as, options, type(options[0]), type(options[1]), needs_grad


def again(known: Known, tensors: Arrays) -> Results | None:
    """Do as `forward` does, for what is known as something."""
    try:
        ready = _latest.get(known)
    except TypeError:  # an option that cannot be hashed is none that there is
        return None
    if ready is None:
        return None
    threads, requires_grad, run, _ = ready
    try:
        if threads == get_num_threads() and (not requires_grad or known[-1] or not is_grad_enabled()):
            made = run(tensors)
            if made is not None:
                return made
        return _search(known, tensors)
    except LaunchError:  # it has written nothing, and the long way tries again, then says why and goes on
        forget()
        return None


# what torch.compile could not compile as a whole it compiles frame by frame: not this, and nothing that it calls
set_code_exec_strategy(again.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _search(known: Known, tensors: Arrays) -> Results | None:
    try:
        alike = _calls.get(_key(known, tensors))
    # what is no tensor has no shape, nor has a nested one, and that of a fake one is not always known
    except (AttributeError, RuntimeError, TypeError):
        return None
    for ready in alike or ():
        threads, requires_grad, run, _ = ready
        fits_now = threads == get_num_threads() and (not requires_grad or known[-1] or not is_grad_enabled())
        made = run(tensors) if fits_now else None
        if made is not None:
            _latest[known] = ready
            return made
    return None


def _key(known: Known, tensors: Arrays) -> tuple[object, ...]:
    return *known, tensors[0].shape, tensors[0].dtype, *map(type, tensors)


def backward(known_as: Known, tensors: Arrays) -> Results | None:
    """Compute gradients as they were computed before, in plain eager code or an operator; None if nothing like that was kept.

    Args:
        known_as: as for `keep_backward`.
        tensors: dy, dresidual_out, h, weight, mean and rstd.

    Returns:
        The gradients of x, residual, weight and bias, then the problem.
    """
    try:
        for threads, _, run, _ in _calls.get(known_as, ()):
            made = run(tensors) if threads == get_num_threads() else None
            if made is not None:
                return made
    except LaunchError:  # as in `forward`
        forget()
    return None


set_code_exec_strategy(backward.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def keep(call: Call, problem: Problem, kernels: Kernels, known_as: object = None) -> None:
    """Keep what was chosen for a call, where the implementation can prepare others like it; `known_as` as in `forward`."""
    function, tensors, options = call.parts()
    if type(call.x) is not Tensor or (call.residual_out is not None and problem.residual_out_dtype is None):
        return  # x is copied into residual_out by other means than the kernel's
    run = _prepared(kernels, of_forward, problem, tensors)
    if run is None:
        return
    requires_grad = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    ready = Prepared(get_num_threads(), requires_grad, run, problem)
    name = known(known_as or function, options, problem.needs_grad)
    _keep(_key(name, tensors), ready)
    _latest[name] = ready


def keep_backward(known_as: Known, problem: Problem, wanted: Wanted, tensors: Arrays, kernels: Kernels) -> None:
    """Keep what was chosen for a backward pass, as `keep` does.

    Args:
        known_as: what decides on all that the tensors themselves do not.
        problem: the layout is that of the tensors.
        wanted: the gradients.
        tensors: as in `backward`.
        kernels: the implementation's functions.
    """
    run = _prepared(kernels, of_backward, problem, wanted, tensors)
    if run is not None:
        _keep(known_as, Prepared(get_num_threads(), False, run, problem))


def _prepared(kernels: Kernels, guarded_of: Callable[..., Guarded | None], *facts: object) -> Run | None:
    """Return what an implementation makes of what is known of a call; None if it cannot, or if that is not enough."""
    if not hasattr(kernels, "prepare"):
        return None
    guarded = guarded_of(*facts)
    run: Run | None = None if guarded is None else kernels.prepare(guarded)
    return run


def _keep(key: tuple[object, ...], ready: Prepared) -> None:
    if len(_calls) >= _MOST:
        forget()
    _calls[key] = (ready, *_calls.get(key, ())[: _MOST_ALIKE - 1])


def forget() -> None:
    """Keep no calls any more."""
    _calls.clear()
    _latest.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)  # what was prepared goes to threads that a child process does not have
