# SPDX-License-Identifier: Apache-2.0
"""Calls like one before: what was chosen then is launched at once.

To validate, to describe and to choose takes many times as long as to compute a few rows. So the choice is kept, with a guard:
of the kind that torch.compile has for its own, it sees in one look whether the tensors are like those of then in type, device,
dtype, shape, strides, and in all that torch would treat them by. Whatever is not like that goes the long way, errors too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, contiguous_format, empty, empty_like, get_num_threads, is_grad_enabled
from torch._C import _increment_version
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._dynamo.guards import TensorGuards
from torch.nn import Parameter

from normkit.call import Arrays, Call, Options
from normkit.errors import LaunchError
from normkit.spec import Problem

Bind = Callable[[tuple[int, ...]], Callable[[], None]]
"""Takes the addresses of x, residual, weight, bias, y, residual_out, mean and rstd, contiguous, 0 for what there is not, and
returns what runs the kernel on them."""

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Problem]
"""y, residual_out, mean and rstd, as in `normkit.interface.Forward`, and the call as it was described when it was prepared."""

# calls to keep, those among them that differ in the strides of their tensors and the like, and addresses of each
_MOST, _MOST_ALIKE, _MOST_ADDRESSES = 1024, 8, 1024

_calls: dict[tuple[object, ...], list[Prepared]] = {}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is left to do in a call.

    Attributes:
        problem: the call, as it was described when it was prepared.
        given: picks the tensors that are not None.
        fits: whether these are like those of the call that was prepared.
        requires_grad: whether one of them asks for a gradient.
        in_place: whether y is x, and residual_out the residual.
        y_dtype: dtype of y.
        residual_out_dtype: dtype of residual_out; None if there is none.
        statistics: shape of the statistics; None if they are not wanted.
        has_mean: whether the mean is one of them.
        pairs: place and size of the two of each pair of tensors that must not share memory, as one of them is written to.
        bound: what runs the kernel, by addresses of which that is known.
        written: picks the tensors given to write to whose versions torch counts; None if there are none.
        bind: as its type says.
    """

    problem: Problem
    given: Callable[[Arrays], Any]
    fits: Callable[..., bool]
    requires_grad: bool
    in_place: bool
    y_dtype: torch.dtype
    residual_out_dtype: torch.dtype | None
    statistics: tuple[int, ...] | None
    has_mean: bool
    pairs: list[tuple[int, int, int, int]]
    bound: dict[tuple[int, ...], Callable[[], None]]
    written: Callable[[Arrays], Any] | None
    bind: Bind


def forward(known_as: object, tensors: Arrays, options: Options, needs_grad: bool = False) -> Results | None:
    """Compute a call that was prepared, in plain eager code or within an operator; None if there is none like it.

    One function, and some of it written out, because all that it does takes less time than a few calls.

    Args:
        known_as: the function as in `normkit.call.Call`, whose arguments need not be right; with more where the guard sees too
            little.
        tensors: those given.
        options: the others.
        needs_grad: whether the statistics are wanted.
    """
    x, residual, weight, bias, out, residual_out = tensors
    if type(x) is not Tensor:
        return None
    types = type(residual), type(weight), type(bias), type(out), type(residual_out)
    try:
        alike = _calls.get((known_as, options, needs_grad, x.shape, x.dtype, types, get_num_threads()))
    except (TypeError, RuntimeError):  # an option that cannot be hashed is none that there is, and a nested x has no shape
        return None
    if not alike:
        return None
    if (  # a nested tensor has no strides, and to look for them the guard would end the process
        (residual is not None and residual.is_nested)
        or (weight is not None and weight.is_nested)
        or (bias is not None and bias.is_nested)
        or (out is not None and out.is_nested)
        or (residual_out is not None and residual_out.is_nested)
    ):
        return None
    for ready in alike:
        if ready.fits(*ready.given(tensors)):
            break
    else:
        return None
    if ready.requires_grad and not needs_grad and is_grad_enabled():
        return None
    one, other = x.data_ptr(), 0 if residual is None else residual.data_ptr()
    parameters = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    addresses: tuple[int, ...]
    mean = rstd = None
    if ready.in_place:
        y, residual_out = x, residual
        addresses = (one, other, *parameters, one, other, 0, 0)
    else:
        y, residual_out, mean, rstd = made = _room(ready, x, out, residual_out)
        addresses = (one, other, *parameters, *[0 if tensor is None else tensor.data_ptr() for tensor in made])
    launch = (ready.bound.get(addresses) or _bound(ready, addresses)) if ready.pairs else ready.bind(addresses)
    if launch is None:
        return None
    try:
        launch()
    except LaunchError:  # it has written nothing, and the long way tries again, then says why and goes on
        _calls.clear()
        return None
    if ready.written:
        _increment_version(ready.written(tensors))
    return y, residual_out, mean, rstd, ready.problem


# what torch.compile could not compile as a whole it compiles frame by frame: not this, and nothing that it calls
set_code_exec_strategy(forward.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _room(ready: Prepared, x: Tensor, y: Tensor | None, residual_out: Tensor | None) -> tuple[Any, Any, Any, Any]:
    if y is None:
        y = empty_like(x, dtype=ready.y_dtype, memory_format=contiguous_format)
    if residual_out is None and ready.residual_out_dtype:
        residual_out = empty_like(x, dtype=ready.residual_out_dtype, memory_format=contiguous_format)
    if ready.statistics is None:
        return y, residual_out, None, None
    rstd = empty(ready.statistics, dtype=torch.float32, device=x.device)
    return y, residual_out, empty_like(rstd) if ready.has_mean else None, rstd


def _bound(ready: Prepared, addresses: tuple[int, ...]) -> Callable[[], None] | None:
    """Return what runs the kernel; None if memory to write to is also other memory of the call."""
    for one, size, other, other_size in ready.pairs:
        if addresses[one] < addresses[other] + other_size and addresses[other] < addresses[one] + size:
            return None
    if len(ready.bound) >= _MOST_ADDRESSES:
        ready.bound.clear()
    launch = ready.bound[addresses] = ready.bind(addresses)
    return launch


def keep(call: Call, problem: Problem, kernels: object, known_as: object = None) -> None:
    """Keep what was chosen for a call, where the implementation can launch it again by itself; `known_as` as in `forward`."""
    launcher = getattr(kernels, "launcher", None)
    function, tensors, options = call.parts()
    given = [tensor for tensor in tensors if tensor is not None]
    plain = type(call.x) is Tensor and all(map(_is_plain, given))
    if launcher is None or not problem.rows or not plain or len(set(map(id, given))) < len(given):
        return  # the last of these is what the guard takes to be another call
    in_place, dtype = problem.in_place, problem.residual_out_dtype
    if call.residual_out is not None and dtype is None:
        return  # x is copied there by other means than the kernel's
    bind = launcher(problem, call.x.device)
    if bind is None:
        return
    written = [place for place in ((0, 1) if in_place else (4, 5)) if tensors[place] is not None]
    counted = [place for place in written if not tensors[place].is_inference()]
    layouts: dict[str, Any] = {
        "dynamic_dims_sizes": [[*tensor.shape] for tensor in given],
        "dynamic_dims_strides": [[*tensor.stride()] for tensor in given],
    }
    ready = Prepared(
        problem=problem,
        given=_picking([place for place, tensor in enumerate(tensors) if tensor is not None]),
        fits=TensorGuards(*given, **layouts).check,
        requires_grad=any(tensor.requires_grad for tensor in given),
        in_place=in_place,
        y_dtype=getattr(torch, problem.out_dtype),
        residual_out_dtype=getattr(torch, dtype) if dtype else None,
        statistics=problem.shape[:-1] if problem.needs_grad else None,
        has_mean=problem.spec.subtract_mean,
        pairs=_pairs([0 if tensor is None else tensor.nbytes for tensor in tensors], written),
        bound={},
        written=_picking(counted) if counted else None,
        bind=bind,
    )
    if len(_calls) >= _MOST:
        _calls.clear()
    types = tuple(map(type, tensors[1:]))
    key = (known_as or function, options, problem.needs_grad, call.x.shape, call.x.dtype, types, get_num_threads())
    alike = _calls.setdefault(key, [])
    alike.insert(0, ready)
    del alike[_MOST_ALIKE:]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.is_contiguous() and not tensor.is_neg()


def _picking(places: list[int]) -> Callable[[Arrays], Any]:
    return itemgetter(*places) if len(places) > 1 else lambda tensors: (tensors[places[0]],)


def _pairs(sizes: list[int], written: list[int]) -> list[tuple[int, int, int, int]]:
    """Return the pairs of tensors of which one is written to; those of y and residual_out in place are x and the residual."""
    read = [place for place in range(4) if sizes[place] and place not in written]
    pairs = [*pairwise(written), *((one, other) for one in written for other in read)]
    return [(one, sizes[one], other, sizes[other]) for one, other in pairs]
