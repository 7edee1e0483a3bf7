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
from normkit.interface import Gradients, Wanted
from normkit.spec import Problem

from . import allocate
from .guarded import Results, Run, bound, in_python, on_tensors

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
    return again(known(known_as, options, needs_grad), tensors)


def known(known_as: object, options: Options, needs_grad: bool) -> tuple[Any, ...]:
    """Return what decides on a call besides its tensors; arguments as for `forward`."""
    # 1.0, True and Decimal(1) are one key, and not all of them are right
    return known_as, options, type(options[0]), type(options[1]), needs_grad


def again(call: tuple[Any, ...], tensors: Arrays) -> Results | None:
    """Do as `forward` does, for what `known` has returned."""
    try:
        ready = _latest.get(call)
    except TypeError:  # an option that cannot be hashed is none that there is
        return None
    if ready is None:
        return None
    threads, requires_grad, run, _ = ready
    try:
        if threads == get_num_threads() and (not requires_grad or call[-1] or not is_grad_enabled()):
            made = run(tensors)
            if made is not None:
                return made
        return _search(call, tensors)
    except LaunchError:  # it has written nothing, and the long way tries again, then says why and goes on
        forget()
        return None


# what torch.compile could not compile as a whole it compiles frame by frame: not this, and nothing that it calls
set_code_exec_strategy(again.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _search(call: tuple[Any, ...], tensors: Arrays) -> Results | None:
    try:
        alike = _calls.get((*call, tensors[0].shape, tensors[0].dtype, *map(type, tensors)))
    # what is no tensor has no shape, nor has a nested one, and that of a fake one is not always known
    except (AttributeError, RuntimeError, TypeError):
        return None
    for ready in alike or ():
        threads, requires_grad, run, _ = ready
        fits_now = threads == get_num_threads() and (not requires_grad or call[-1] or not is_grad_enabled())
        made = run(tensors) if fits_now else None
        if made is not None:
            _latest[call] = ready
            return made
    return None


def backward(known_as: tuple[object, ...], tensors: Arrays) -> Results | None:
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


def keep(call: Call, problem: Problem, kernels: object, known_as: object = None) -> None:
    """Keep what was chosen for a call, where the implementation can launch it again by itself; `known_as` as in `forward`."""
    function, tensors, options = call.parts()
    if not problem.rows or type(call.x) is not Tensor or not _can_be_guarded(tensors):
        return
    if call.residual_out is not None and problem.residual_out_dtype is None:
        return  # x is copied there by other means than the kernel's
    guarded = _guarded(problem, tensors)
    if hasattr(kernels, "compute"):
        run: Run | None = on_tensors(guarded, kernels.compute)
    else:
        run = _run(guarded, getattr(kernels, "runner", None), getattr(kernels, "launcher", None), call.x.device)
    if run is None:
        return
    requires_grad = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    ready = Prepared(get_num_threads(), requires_grad, run, problem)
    key = known(known_as or function, options, problem.needs_grad)
    _keep((*key, call.x.shape, call.x.dtype, *map(type, tensors)), ready)
    _latest[key] = ready


def keep_backward(known_as: tuple[object, ...], problem: Problem, wanted: Wanted, tensors: Arrays, kernels: object) -> None:
    """Keep what was chosen for a backward pass, as `keep` does.

    Args:
        known_as: what decides on all that the tensors themselves do not.
        problem: the layout is that of the tensors.
        wanted: the gradients.
        tensors: as in `backward`.
        kernels: the implementation's functions.
    """
    if not problem.rows or not _can_be_guarded(tensors):
        return
    device, hidden = tensors[0].device, problem.shape[-1:]
    of_operands = problem.x_dtype, problem.residual_dtype, problem.weight_dtype, problem.bias_dtype
    dtypes = [dtype if asked else None for dtype, asked in zip(of_operands, wanted, strict=True)]
    places, given = _places(tensors)
    gradients, make = _results([0] * 4, [problem.shape] * 2 + [hidden] * 2, dtypes, len(given), device)
    made = Gradients(*gradients)
    guarded = Guarded(
        problem=problem,
        places=tuple(places),
        fits=_guard(given),
        make=make,
        results=tuple(position or 0 for position in (made if wanted.dresidual else made.by_operand(problem))),
        pointers=(*_positions(places), *gradients),
        pairs=(),
        written=(),
        address_of=Tensor.data_ptr,
        count_as_written=_increment_version,
    )
    own = getattr(kernels, "backward_runner", None), getattr(kernels, "backward_launcher", None)
    run = _run(guarded, *own, wanted, tensors[1] is not None, device)
    if run is not None:
        _keep(known_as, Prepared(get_num_threads(), False, run, problem))


def _run(guarded: Guarded, runner: Any, launcher: Any, *facts: object) -> Run | None:
    """Return what an implementation's own functions make of a call: at once, or of what binds its kernels to addresses."""
    run: Run | None = runner(guarded) if runner else None
    if run is not None or launcher is None:
        return run
    bind = launcher(guarded.problem, *facts)
    return None if bind is None else in_python(guarded, bind)


def _keep(key: tuple[object, ...], ready: Prepared) -> None:
    if len(_calls) >= _MOST:
        forget()
    alike = _calls.setdefault(key, [])
    alike.insert(0, ready)
    del alike[_MOST_ALIKE:]


def forget() -> None:
    """Keep no calls any more."""
    _calls.clear()
    _latest.clear()
    bound.clear()


def _can_be_guarded(tensors: Arrays) -> bool:
    _, given = _places(tensors)
    # a guard takes one tensor in two places for another call
    return all(map(_is_plain, given)) and len(set(map(id, given))) == len(given)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.is_contiguous() and not tensor.is_neg()


def _places(tensors: Arrays) -> tuple[list[int], list[Tensor]]:
    places = [place for place, tensor in enumerate(tensors) if tensor is not None]
    return places, [tensors[place] for place in places]


def _positions(places: list[int]) -> list[int]:
    """Return for each of six tensors where it is among those given, from 1; 0 where it is not."""
    return [places.index(place) + 1 if place in places else 0 for place in range(6)]


def _guard(given: list[Tensor]) -> Callable[..., bool]:
    layouts: dict[str, Any] = {
        "dynamic_dims_sizes": [[*tensor.shape] for tensor in given],
        "dynamic_dims_strides": [[*tensor.stride()] for tensor in given],
    }
    return TensorGuards(*given, **layouts).check


def _guarded(problem: Problem, tensors: Arrays) -> Guarded:
    places, given = _places(tensors)
    writes = (0, 1) if problem.in_place else (4, 5)
    written = [place for place in writes if place in places]
    positions = _positions(places)
    statistics = problem.compute_dtype if problem.needs_grad else None
    dtypes = [problem.out_dtype, problem.residual_out_dtype, statistics if problem.spec.subtract_mean else None, statistics]
    shapes = [problem.shape] * 2 + [problem.shape[:-1]] * 2
    given_at = [*(positions[place] for place in writes), 0, 0]
    results, make = _results(given_at, shapes, dtypes, len(given), tensors[0].device)
    return Guarded(
        problem=problem,
        places=tuple(places),
        fits=_guard(given),
        make=make,
        results=results,
        pointers=(*positions[:4], *results),
        pairs=_pairs([0 if tensor is None else tensor.nbytes for tensor in tensors], written),
        written=tuple(place for place in written if not tensors[place].is_inference()),
        address_of=Tensor.data_ptr,
        count_as_written=_increment_version,
    )


def _results(
    given_at: list[int], shapes: list[tuple[int, ...]], dtypes: list[str | None], given: int, device: torch.device
) -> tuple[tuple[int, ...], tuple[Callable[[], Tensor], ...]]:
    """Return where four results are, as in `Guarded`, and what makes those that are not given and have a dtype."""
    results: list[int] = []
    make: list[Callable[[], Tensor]] = []
    for position, shape, dtype in zip(given_at, shapes, dtypes, strict=True):
        if position or dtype is None:
            results.append(position)
        else:
            make.append(allocate.maker(shape, getattr(torch, dtype), device))
            results.append(given + len(make))
    return tuple(results), tuple(make)


def _pairs(sizes: list[int], written: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the pairs of tensors of which one is written to; those of y and residual_out in place are x and the residual."""
    read = [place for place in range(4) if sizes[place] and place not in written]
    pairs = [*pairwise(written), *((one, other) for one in written for other in read)]
    return tuple((one, sizes[one], other, sizes[other]) for one, other in pairs)
