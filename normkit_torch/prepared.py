# SPDX-License-Identifier: Apache-2.0
"""Calls like one before: what was chosen then is launched at once.

To validate, to describe and to choose takes many times as long as to compute a few rows. So the choice is kept, with a guard:
of the kind that torch.compile has for its own, it sees in one look whether the tensors are like those of then in type, device,
dtype, shape, strides, and in all that torch would treat them by. Whatever is not like that goes the long way, errors too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from normkit.call import Call
from normkit.spec import Problem

Launch = Callable[..., None]
"""launch(x, residual, weight, bias, y, residual_out, mean, rstd): addresses of contiguous arrays, 0 for what there is not."""

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""y, residual_out, mean and rstd, as in `normkit.interface.Forward`."""

_MOST, _MOST_ALIKE = 1024, 8
_TYPES = (Tensor, Parameter)

_calls: dict[tuple[object, ...], list[Prepared]] = {}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is left to do in a call.

    Attributes:
        fits: whether tensors are like those of the call that was prepared.
        launch: runs the kernel.
        are_apart: whether no memory that is written to is also other memory of the call, by the addresses that `launch` takes.
        requires_grad: whether a tensor asks for a gradient.
        in_place: whether y is x, and residual_out the residual.
        counts: whether torch counts the versions of what is written to, which it does not of inference tensors.
        y_dtype: dtype of y.
        residual_out_dtype: dtype of residual_out; None if there is none.
        statistics: shape of the statistics; None if they are not wanted.
        has_mean: whether the mean is one of them.
    """

    fits: Callable[..., bool]
    launch: Launch
    are_apart: Callable[..., bool]
    requires_grad: bool
    in_place: bool
    counts: bool
    y_dtype: torch.dtype
    residual_out_dtype: torch.dtype | None
    statistics: tuple[int, ...] | None
    has_mean: bool


def forward(
    function: str,
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    eps: float,
    weight_offset: float,
    rounding: str | None,
    residual_dtype: object,
    out_dtype: object,
    implementation: str | None,
    out: Any = None,
    residual_out: Any = None,
    needs_grad: bool = False,
) -> Results | None:
    """Compute a call that was prepared, in plain eager code or within an operator; None if there is none like it.

    The arguments are those of `normkit.call.Call`, which need not be right, and whether the statistics are wanted.
    """
    options = (function, eps, weight_offset, rounding, residual_dtype, out_dtype, implementation, needs_grad)
    ready = _find(options, x, residual, weight, bias, out, residual_out)
    if ready is None or (ready.requires_grad and not needs_grad and torch.is_grad_enabled()):
        return None
    y, written, mean, rstd = out, residual_out, None, None
    if ready.in_place:
        y, written = x, residual
    writes = y is not None or written is not None
    if y is None:
        y = torch.empty_like(x, dtype=ready.y_dtype)
    if written is None and ready.residual_out_dtype:
        written = torch.empty_like(x, dtype=ready.residual_out_dtype)
    if ready.statistics is not None:
        rstd = torch.empty(ready.statistics, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if ready.has_mean else None
    pointers = (
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if written is None else written.data_ptr(),
    )
    if writes and not ready.are_apart(*pointers):
        return None
    ready.launch(*pointers, 0 if mean is None else mean.data_ptr(), 0 if rstd is None else rstd.data_ptr())
    if writes and ready.counts:
        increment_version(
            [tensor for tensor in ((x, residual) if ready.in_place else (out, residual_out)) if tensor is not None]
        )
    return y, written, mean, rstd


def _find(options: tuple[object, ...], *tensors: Any) -> Prepared | None:
    x = tensors[0]
    if type(x) is not Tensor:
        return None
    try:
        alike = _calls.get((options, x.shape, x.dtype, *map(type, tensors)))
    except TypeError:  # an option cannot be hashed, and is none that there is
        return None
    given = [tensor for tensor in tensors if tensor is not None]
    for ready in alike or ():
        if ready.fits(*given):
            return ready
    return None


def keep(call: Call, problem: Problem, kernels: object) -> None:
    """Keep what was chosen for a call, where the implementation can launch it again by itself."""
    launcher = getattr(kernels, "launcher", None)
    tensors = (call.x, call.residual, call.weight, call.bias, call.out, call.residual_out)
    given = [tensor for tensor in tensors if tensor is not None]
    if launcher is None or not problem.rows or not all(map(_is_plain, given)):
        return
    in_place = problem.in_place
    written = (call.x, call.residual) if in_place else tuple(call.outputs.values())
    if len({tensor.is_inference() for tensor in written}) > 1:
        return
    options = (
        *(call.function, call.eps, call.weight_offset, call.rounding, call.residual_dtype, call.out_dtype),
        *(call.implementation, problem.needs_grad),
    )
    # a call that goes on with other options is refused before; a guard of torch.compile takes sizes and strides as given
    guard = TensorGuards(
        *given,
        dynamic_dims_sizes=[[*tensor.shape] for tensor in given],
        dynamic_dims_strides=[[*tensor.stride()] for tensor in given],
    )
    wanted = problem.residual_out_dtype
    sizes = [0 if tensor is None else tensor.nbytes for tensor in tensors]
    ready = Prepared(
        fits=guard.check,
        launch=launcher(problem),
        are_apart=lru_cache(_MOST)(partial(_are_apart, _pairs(sizes, in_place))),
        requires_grad=any(tensor.requires_grad for tensor in given),
        in_place=in_place,
        counts=not any(tensor.is_inference() for tensor in written),
        y_dtype=getattr(torch, problem.out_dtype),
        residual_out_dtype=getattr(torch, wanted) if wanted else None,
        statistics=problem.shape[:-1] if problem.needs_grad else None,
        has_mean=problem.spec.subtract_mean,
    )
    if len(_calls) >= _MOST:
        _calls.clear()
    alike = _calls.setdefault((options, call.x.shape, call.x.dtype, *map(type, tensors)), [])
    alike.insert(0, ready)
    del alike[_MOST_ALIKE:]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _TYPES and tensor.is_contiguous() and not tensor.is_neg()


def _pairs(sizes: list[int], in_place: bool) -> list[tuple[int, int, int, int]]:
    """Return place and size of the two of each pair of tensors that must not share memory, in the order of `Launch`."""
    written, read = ((0, 1), (2, 3)) if in_place else ((4, 5), (0, 1, 2, 3))
    pairs = [(written[0], written[1]), *((one, other) for one in written for other in read)]
    return [(one, sizes[one], other, sizes[other]) for one, other in pairs if sizes[one] and sizes[other]]


def _are_apart(pairs: list[tuple[int, int, int, int]], *starts: int) -> bool:
    return all(
        starts[one] + size <= starts[other] or starts[other] + other_size <= starts[one]
        for one, size, other, other_size in pairs
    )
