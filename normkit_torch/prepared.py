# SPDX-License-Identifier: Apache-2.0
"""Calls like one before: what was chosen then is launched at once.

To validate, to describe and to choose takes many times as long as to compute a few rows. So the choice is kept, with a guard:
of the kind that torch.compile has for its own, it sees in one look whether the tensors are like those of then in type, device,
dtype, shape, strides, and in all that torch would treat them by. Whatever is not like that goes the long way, errors too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import _increment_version
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._dynamo.guards import TensorGuards
from torch.nn import Parameter

from normkit.call import Arrays, Call, Options
from normkit.cpu.prepared import Guarded
from normkit.errors import LaunchError
from normkit.spec import Problem

from . import allocate
from .guarded import Results, Run, bound, in_python

# calls to keep, and those among them that differ in the strides of their tensors and the like
_MOST, _MOST_ALIKE = 1024, 8


class Prepared(NamedTuple):
    """A call that is known.

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


_calls: dict[tuple[object, ...], list[Prepared]] = {}
# the last one that was used, of those with the same options
_latest: dict[tuple[object, ...], Prepared] = {}


def forward(known_as: object, tensors: Arrays, options: Options, needs_grad: bool = False) -> Results | None:
    """Compute a call that was prepared, in plain eager code or within an operator; None if there is none like it.

    Args:
        known_as: the function as in `normkit.call.Call`, whose arguments need not be right; with more where the guard sees too
            little.
        tensors: those given.
        options: the others.
        needs_grad: whether the statistics are wanted.
    """
    try:
        ready = _latest.get((known_as, options, type(options[0]), type(options[1]), needs_grad))
    except TypeError:  # an option that cannot be hashed is none that there is
        return None
    if ready is None:
        return None
    threads, requires_grad, run, _ = ready
    try:
        if threads == get_num_threads() and (not requires_grad or needs_grad or not is_grad_enabled()):
            made = run(tensors)
            if made is not None:
                return made
        return _search(known_as, tensors, options, needs_grad)
    except LaunchError:  # it has written nothing, and the long way tries again, then says why and goes on
        forget()
        return None


# what torch.compile could not compile as a whole it compiles frame by frame: not this, and nothing that it calls
set_code_exec_strategy(forward.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _search(known_as: object, tensors: Arrays, options: Options, needs_grad: bool) -> Results | None:
    try:
        known = known_as, options, type(options[0]), type(options[1]), needs_grad
        alike = _calls.get((*known, tensors[0].shape, tensors[0].dtype, *map(type, tensors)))
    # what is no tensor has no shape, nor has a nested one, and that of a fake one is not always known
    except (AttributeError, RuntimeError, TypeError):
        return None
    for ready in alike or ():
        threads, requires_grad, run, _ = ready
        fits_now = threads == get_num_threads() and (not requires_grad or needs_grad or not is_grad_enabled())
        made = run(tensors) if fits_now else None
        if made is not None:
            _latest[known] = ready
            return made
    return None


def keep(call: Call, problem: Problem, kernels: object, known_as: object = None) -> None:
    """Keep what was chosen for a call, where the implementation can launch it again by itself; `known_as` as in `forward`."""
    launcher, runner = getattr(kernels, "launcher", None), getattr(kernels, "runner", None)
    function, tensors, options = call.parts()
    given = [tensor for tensor in tensors if tensor is not None]
    plain = type(call.x) is Tensor and all(map(_is_plain, given))
    if launcher is None or not problem.rows or not plain or len(set(map(id, given))) < len(given):
        return  # the last of these is what the guard takes to be another call
    if call.residual_out is not None and problem.residual_out_dtype is None:
        return  # x is copied there by other means than the kernel's
    guarded = _guarded(problem, tensors)
    run = runner(guarded) if runner else None
    if run is None:
        bind = launcher(problem, call.x.device)
        if bind is None:
            return
        run = in_python(guarded, bind)
    ready = Prepared(get_num_threads(), any(tensor.requires_grad for tensor in given), run, problem)
    if len(_calls) >= _MOST:
        forget()
    # 1.0, True and Decimal(1) are one key, and not all of them are right
    known = known_as or function, options, type(options[0]), type(options[1]), problem.needs_grad
    alike = _calls.setdefault((*known, call.x.shape, call.x.dtype, *map(type, tensors)), [])
    alike.insert(0, ready)
    del alike[_MOST_ALIKE:]
    _latest[known] = ready


def forget() -> None:
    """Keep no calls any more."""
    _calls.clear()
    _latest.clear()
    bound.clear()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.is_contiguous() and not tensor.is_neg()


def _guarded(problem: Problem, tensors: Arrays) -> Guarded:
    places = [place for place, tensor in enumerate(tensors) if tensor is not None]
    given = [tensors[place] for place in places]
    writes = (0, 1) if problem.in_place else (4, 5)
    written = [place for place in writes if place in places]
    layouts: dict[str, Any] = {
        "dynamic_dims_sizes": [[*tensor.shape] for tensor in given],
        "dynamic_dims_strides": [[*tensor.stride()] for tensor in given],
    }
    results, make = _results(problem, tensors[0].device, places)
    return Guarded(
        problem=problem,
        places=tuple(places),
        fits=TensorGuards(*given, **layouts).check,
        make=make,
        results=results,
        pointers=(*(places.index(place) + 1 if place in places else 0 for place in range(4)), *results),
        pairs=_pairs([0 if tensor is None else tensor.nbytes for tensor in tensors], written),
        written=tuple(place for place in written if not tensors[place].is_inference()),
        address_of=Tensor.data_ptr,
        count_as_written=_increment_version,
    )


def _results(
    problem: Problem, device: torch.device, places: list[int]
) -> tuple[tuple[int, ...], tuple[Callable[[], Tensor], ...]]:
    """Return where y, residual_out, mean and rstd are, as in `Guarded`, and what makes them."""
    if problem.in_place:
        return (1, 2, 0, 0), ()
    statistics = problem.compute_dtype if problem.needs_grad else None
    dtypes = problem.out_dtype, problem.residual_out_dtype, statistics if problem.spec.subtract_mean else None, statistics
    shapes = [problem.shape] * 2 + [problem.shape[:-1]] * 2
    results: list[int] = []
    make: list[Callable[[], Tensor]] = []
    for place, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True), start=4):
        if place in places:
            results.append(places.index(place) + 1)
        elif dtype is None:
            results.append(0)
        else:
            make.append(allocate.maker(shape, getattr(torch, dtype), device))
            results.append(len(places) + len(make))
    return tuple(results), tuple(make)


def _pairs(sizes: list[int], written: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the pairs of tensors of which one is written to; those of y and residual_out in place are x and the residual."""
    read = [place for place in range(4) if sizes[place] and place not in written]
    pairs = [*pairwise(written), *((one, other) for one in written for other in read)]
    return tuple((one, sizes[one], other, sizes[other]) for one, other in pairs)
