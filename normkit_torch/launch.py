# SPDX-License-Identifier: Apache-2.0
"""The `triton` implementation: torch tensors + plan -> the kernels of normkit.kernels; here the forward pass."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from normkit import plan
from normkit.compile import operand_dtypes
from normkit.interface import Forward, Guarded, Rejected, Run
from normkit.prepared import Start, in_python
from normkit.spec import Problem

from . import failures, launch_backward, steps
from .launch_backward import backward

__all__ = ["backward", "forward", "forward_", "forward_into", "prepare", "supports"]

_PLATFORMS = ("cuda", "rocm", "xpu")

_forwards: dict[tuple[Problem, torch.device], Start] = {}


def supports(problem: Problem) -> Rejected | None:
    """Accept float32, bfloat16 and float16 on the platforms that Triton has, where it is installed."""
    if problem.platform not in _PLATFORMS:
        return Rejected(f"Triton runs on {', '.join(_PLATFORMS)}, not on {problem.platform}")
    if not _has_triton():
        return Rejected("triton is not installed: pip install triton")
    failed = failures.reason(problem)
    return plan.supports(problem) if failed is None else Rejected(failed)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def forward(problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Forward:
    """Compute y, residual_out and, if a backward may follow, the statistics, in one launch."""
    statistics = "float32" if problem.needs_grad else None
    out = Forward(
        y=steps.new(x, problem.shape, problem.out_dtype),
        residual_out=steps.new(x, problem.shape, problem.residual_out_dtype),
        mean=steps.new(x, problem.shape[:-1], statistics if problem.spec.subtract_mean else None),
        rstd=steps.new(x, problem.shape[:-1], statistics),
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


def prepare(guarded: Guarded) -> Run | None:
    """Return what launches calls like one before, None while Triton interprets."""
    if guarded.wanted is not None:
        return launch_backward.prepare(guarded)
    start = _ready(guarded.problem, guarded.device)
    return None if start is None else in_python(guarded, start)


def _ready(problem: Problem, device: torch.device) -> Start | None:
    """Return what launches a forward pass of contiguous rows, by addresses in the order of `operand_dtypes`."""
    start = _forwards.get((problem, device))
    if start is None:
        step = plan.forward_plan(problem)
        if steps.is_interpreted(step):
            return None
        scalars = _forward_arguments(problem, None, None, None, None, Forward(None, None, None, None))
        start = steps.bind(step, operand_dtypes(problem), device, scalars, problem.rows * problem.hidden_size)
        if len(_forwards) >= steps.MOST:
            _forwards.clear()
        _forwards[problem, device] = start
    return start


def _launch_forward(
    problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Forward
) -> None:
    if not problem.rows:
        return
    weight, bias = (tensor if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    with failures.remembered(problem):
        start = _ready(problem, x.device) if problem.layout == "contiguous" else None
        if start is None:
            steps.launch(plan.forward_plan(problem), _forward_arguments(problem, x, residual, weight, bias, out))
        else:
            start(steps.addresses_of((x, residual, weight, bias, *out)))


def _forward_arguments(
    problem: Problem, x: Tensor | None, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Forward
) -> dict[str, Any]:
    inner_rows, rows = steps.row_arguments(problem, {"x": x, "residual": residual})
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
