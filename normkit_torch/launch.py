# SPDX-License-Identifier: Apache-2.0
"""The `triton` implementation: torch tensors + plan -> the kernels of normkit.kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit import plan
from normkit.compile import gradient_dtypes, operand_dtypes
from normkit.errors import LaunchError
from normkit.interface import Forward, Gradients, Rejected, Wanted
from normkit.layout import RowStrides, row_layout
from normkit.spec import Problem

from . import jit

_PLATFORMS = ("cuda", "rocm", "xpu")

Start = Callable[[tuple[int, ...]], None]
"""Launches on the arrays at these addresses, 0 for what there is not."""

# kernels and calls to keep; those forgotten are still compiled
_MOST = 1024

_kernels: dict[tuple[object, ...], jit.Kernel] = {}
_forwards: dict[tuple[Problem, torch.device], Start] = {}
_backwards: dict[tuple[object, ...], _Ready] = {}
# why calls with kernels like this one's are no longer accepted
_failed: dict[Problem, str] = {}


def supports(problem: Problem) -> Rejected | None:
    """Accept float32, bfloat16 and float16 on the platforms that Triton has, where it is installed."""
    if problem.platform not in _PLATFORMS:
        return Rejected(f"Triton runs on {', '.join(_PLATFORMS)}, not on {problem.platform}")
    if not _has_triton():
        return Rejected("triton is not installed: pip install triton")
    failed = _failed.get(_with_its_kernels(problem)) if _failed else None
    return plan.supports(problem) if failed is None else Rejected(failed)


def _with_its_kernels(problem: Problem) -> Problem:
    """Return the problem of one row: kernels are the same for any number of rows."""
    return replace(problem, shape=problem.shape[-1:])


@contextmanager
def _remembering_failure(problem: Problem) -> Iterator[None]:
    try:
        yield
    except LaunchError as error:
        _failed[_with_its_kernels(problem)] = str(error)
        raise


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def forward(problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Forward:
    """Compute y, residual_out and, if a backward may follow, the statistics, in one launch."""
    statistics = "float32" if problem.needs_grad else None
    out = Forward(
        y=_new(x, problem.shape, problem.out_dtype),
        residual_out=_new(x, problem.shape, problem.residual_out_dtype),
        mean=_new(x, problem.shape[:-1], statistics if problem.spec.subtract_mean else None),
        rstd=_new(x, problem.shape[:-1], statistics),
    )
    _launch_forward(problem, x, residual, weight, bias, out)
    return out


def forward_(problem: Problem, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Write y into x and residual_out into residual, in one launch."""
    _launch_forward(problem, x, residual, weight, bias, Forward(x, residual, None, None))


def forward_into(
    problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Forward
) -> None:
    """Write the results into the tensors of `out`; the kernels write contiguous rows, so others are copied into."""
    written = Forward(*(None if tensor is None else tensor.contiguous() for tensor in out))
    _launch_forward(problem, x, residual, weight, bias, written)
    for tensor, rows in zip(out, written, strict=True):
        if rows is not tensor:
            tensor.copy_(rows)


def launcher(problem: Problem, device: torch.device) -> Callable[[tuple[int, ...]], Callable[[], None]] | None:
    """Return what binds the kernels to contiguous tensors, None while Triton interprets; see `normkit_torch.prepared.Bind`."""
    start = _ready_forward(problem, device)
    return None if start is None else partial(partial, start)


def _ready_forward(problem: Problem, device: torch.device) -> Start | None:
    """Return what launches a forward pass of contiguous rows, by addresses in the order of `operand_dtypes`."""
    start = _forwards.get((problem, device))
    if start is None:
        step = plan.forward_plan(problem)
        if jit.is_interpreted(jit.kernel_of(step)):
            return None
        scalars = _forward_arguments(problem, None, None, None, None, Forward(None, None, None, None))
        kernel = _kernel(step, _pointers(operand_dtypes(problem)), device)
        if len(_forwards) >= _MOST:
            _forwards.clear()
        start = _forwards[problem, device] = kernel.bind(step.grid, scalars, problem.rows * problem.hidden_size)
    return start


def _launch_forward(
    problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Forward
) -> None:
    if not problem.rows:
        return
    weight, bias = (tensor if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    with _remembering_failure(problem):
        start = _ready_forward(problem, x.device) if problem.layout == "contiguous" else None
        if start is None:
            _launch(plan.forward_plan(problem), _forward_arguments(problem, x, residual, weight, bias, out))
        else:
            start(_addresses((x, residual, weight, bias, *out)))


def _forward_arguments(
    problem: Problem, x: Tensor | None, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Forward
) -> dict[str, Any]:
    inner_rows, rows = _rows(problem, {"x": x, "residual": residual})
    return rows | {
        "weight_ptr": weight,
        "bias_ptr": bias,
        "y_ptr": out.y,
        "residual_out_ptr": out.residual_out,
        "mean_ptr": out.mean,
        "rstd_ptr": out.rstd,
        "rows": problem.rows,
        "inner_rows": inner_rows,
        "eps": float(problem.spec.eps),
        "weight_offset": float(problem.spec.weight_offset),
    }


def backward(
    problem: Problem,
    wanted: Wanted,
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> Gradients:
    """Compute the gradients: dx, dresidual and partial sums in one or two launches, then the total of dweight and of dbias."""
    with _remembering_failure(problem):
        contiguous = problem.layout == "contiguous" and problem.rows
        ready = _ready_backward(problem, wanted, dresidual_out is not None, h.device) if contiguous else None
        planned = plan.backward_plan(problem, wanted) if ready is None else ready.planned
        dx = _new(h, problem.shape, problem.x_dtype if wanted.dx else None)
        dresidual = _new(h, problem.shape, problem.residual_dtype if wanted.dresidual else None)
        partial_shape, shares_shape = (planned.parts, problem.hidden_size), (problem.rows, planned.blocks)
        dweight = _new(h, partial_shape, "float32" if wanted.dweight else None)
        dbias = _new(h, partial_shape, "float32" if wanted.dbias else None)
        x_hat_g = _new(h, shares_shape, "float32" if planned.blocks else None)
        g = _new(h, shares_shape, "float32" if planned.blocks and problem.spec.subtract_mean else None)
        weight = weight if weight is None else weight.contiguous()
        if ready is not None:
            addresses = _addresses((dy, dresidual_out, h, weight, mean, rstd, dx, dresidual, dweight, dbias, x_hat_g, g))
            for start in ready.steps:
                start(addresses)
        elif problem.rows:
            inner_rows, rows = _rows(problem, {"dy": dy, "dresidual_out": dresidual_out, "h": h})
            arguments = rows | {"weight_ptr": weight, "mean_ptr": mean, "rstd_ptr": rstd, "x_hat_g_ptr": x_hat_g, "g_ptr": g}
            arguments |= {"dx_ptr": dx, "dresidual_ptr": dresidual, "dweight_ptr": dweight, "dbias_ptr": dbias}
            arguments |= _backward_scalars(problem, planned, inner_rows)
            for step in planned.steps:
                _launch(step, arguments)
        dweight = _total(planned, ready, dweight, problem.weight_dtype)
        dbias = _total(planned, ready, dbias, problem.bias_dtype)
    return Gradients(dx, dresidual, dweight, dbias)


class _Ready(NamedTuple):
    """What is left to launch of a backward pass of contiguous rows, by addresses in the order of `gradient_dtypes`."""

    planned: plan.BackwardPlan
    steps: list[Start]
    totals: dict[str, Start]


def _ready_backward(problem: Problem, wanted: Wanted, has_stream: bool, device: torch.device) -> _Ready | None:
    key = (problem, wanted, has_stream, device)
    ready = _backwards.get(key)
    if ready is None:
        planned = plan.backward_plan(problem, wanted)
        if jit.is_interpreted(jit.kernel_of(planned.total)):
            return None
        names = gradient_dtypes(problem, wanted) | ({} if has_stream else {"dresidual_out": None})
        _, rows = _rows(problem, {"dy": None, "dresidual_out": None, "h": None})
        scalars = rows | _backward_scalars(problem, planned, inner_rows=1)
        elements = problem.rows * problem.hidden_size
        steps = [_kernel(step, _pointers(names), device).bind(step.grid, scalars, elements) for step in planned.steps]
        totals = {}
        for dtype in (problem.weight_dtype, problem.bias_dtype):
            if dtype is not None:
                pointers = _pointers({"partial": "float32", "total": dtype})
                kernel = _kernel(planned.total, pointers, device)
                totals[dtype] = kernel.bind(
                    planned.total.grid, {"programs": planned.parts}, planned.parts * problem.hidden_size
                )
        if len(_backwards) >= _MOST:
            _backwards.clear()
        ready = _backwards[key] = _Ready(planned, steps, totals)
    return ready


def _backward_scalars(problem: Problem, planned: plan.BackwardPlan, inner_rows: int) -> dict[str, Any]:
    return {
        "rows": problem.rows,
        "rows_per_program": planned.rows_per_program,
        "inner_rows": inner_rows,
        "weight_offset": float(problem.spec.weight_offset),
    }


def _total(planned: plan.BackwardPlan, ready: _Ready | None, partial: Tensor | None, dtype: str | None) -> Tensor | None:
    if partial is None or dtype is None:
        return None
    total = partial.new_empty((partial.shape[1],), dtype=getattr(torch, dtype))
    if ready is None:
        _launch(planned.total, {"partial_ptr": partial, "total_ptr": total, "programs": planned.parts})
    else:
        ready.totals[dtype](_addresses((partial, total)))
    return total


def _addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _pointers(dtypes: Mapping[str, str | None]) -> tuple[tuple[str, torch.dtype | None], ...]:
    return tuple([(f"{name}_ptr", None if dtype is None else getattr(torch, dtype)) for name, dtype in dtypes.items()])


def _new(like: Tensor, shape: tuple[int, ...], dtype: str | None) -> Tensor | None:
    return None if dtype is None else like.new_empty(shape, dtype=getattr(torch, dtype))


def _rows(problem: Problem, tensors: Mapping[str, Tensor | None]) -> tuple[int, dict[str, object]]:
    """Return inner_rows, and pointer and row strides of each tensor; one whose rows cannot be reached so is copied."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    strides: dict[str, RowStrides | None] = dict.fromkeys(given, RowStrides(0, 0))
    inner_rows = 1
    if problem.layout != "contiguous":
        layout = row_layout(problem.shape, [tensor.stride() for tensor in given.values()])
        inner_rows, strides = layout.inner_rows, dict(zip(given, layout.strides, strict=True))
    arguments: dict[str, object] = {}
    for name, tensor in tensors.items():
        own = strides.get(name, RowStrides(0, 0))
        arguments[f"{name}_ptr"] = tensor if own is not None or tensor is None else tensor.contiguous()
        own = own or RowStrides(inner_rows * problem.hidden_size, problem.hidden_size)
        arguments[f"{name}_outer"], arguments[f"{name}_inner"] = own
    return inner_rows, arguments


def _launch(step: plan.Step, arguments: Mapping[str, Any]) -> None:
    kernel = jit.kernel_of(step)
    if jit.is_interpreted(kernel):
        given = {name: arguments[name] for name in kernel.arg_names if name not in step.constants}
        kernel[step.grid](**given, **step.constants)
        return
    tensors = [(name, arguments[name]) for name in kernel.arg_names if name.endswith("_ptr")]
    dtypes = tuple([(name, None if tensor is None else tensor.dtype) for name, tensor in tensors])
    addresses = _addresses([tensor for _, tensor in tensors])
    there = [tensor for _, tensor in tensors if tensor is not None]
    _kernel(step, dtypes, there[0].device).bind(step.grid, arguments, max(map(_reach, there)))(addresses)


def _reach(tensor: Tensor) -> int:
    """Return the elements from the first to the last one of a tensor, with those between its rows."""
    return 1 + sum([(size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])


def _kernel(step: plan.Step, dtypes: tuple[tuple[str, torch.dtype | None], ...], device: torch.device) -> jit.Kernel:
    key = (step.kernel, step.num_warps, *step.constants.values(), *dtypes, device)
    found = _kernels.get(key)
    if found is None:
        if len(_kernels) >= _MOST:
            _kernels.clear()
        found = _kernels[key] = jit.Kernel(step, dict(dtypes), device)
    return found
