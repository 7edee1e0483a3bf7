# SPDX-License-Identifier: Apache-2.0
"""The backward pass of the `triton` implementation: the kernels of its plan, with memory for what they hand to one another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normkit import plan
from normkit.compile import gradient_dtypes
from normkit.interface import Gradients, Guarded, Run, Wanted
from normkit.prepared import Start, in_python
from normkit.spec import Problem

from . import allocate, failures, steps

# The arrays of the steps, in the order in which their addresses are given: the caller's, then what `_scratch` says.
_GIVEN = ("dy", "dresidual_out", "h", "weight", "mean", "rstd", "dx", "dresidual")
_SCRATCH = ("dweight", "dbias", "x_hat_g", "g")

_backwards: dict[tuple[object, ...], Start] = {}


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
    hidden = problem.shape[-1:]
    gradients = Gradients(
        steps.new(h, problem.shape, problem.x_dtype if wanted.dx else None),
        steps.new(h, problem.shape, problem.residual_dtype if wanted.dresidual else None),
        steps.new(h, hidden, problem.weight_dtype if wanted.dweight else None),
        steps.new(h, hidden, problem.bias_dtype if wanted.dbias else None),
    )
    weight, mean, rstd = (None if tensor is None else tensor.contiguous() for tensor in (weight, mean, rstd))
    with failures.remembered(problem):
        contiguous = problem.layout == "contiguous" and problem.rows
        start = _ready(problem, wanted, dresidual_out is not None, h.device) if contiguous else None
        if start is None:
            _launch(problem, wanted, dy, dresidual_out, h, weight, mean, rstd, gradients)
        else:
            start(steps.addresses_of((dy, dresidual_out, h, weight, mean, rstd, *gradients)))
    return gradients


def prepare(guarded: Guarded) -> Run | None:
    """Return what launches passes like one before, None while Triton interprets."""
    assert guarded.wanted is not None
    start = _ready(guarded.problem, guarded.wanted, 1 in guarded.places, guarded.device)
    return None if start is None else in_python(guarded, start)


def _ready(problem: Problem, wanted: Wanted, has_dresidual_out: bool, device: torch.device) -> Start | None:
    """Return what launches a backward pass of contiguous rows, by the addresses of its six arrays and of the four gradients."""
    key = (problem, wanted, has_dresidual_out, device)
    ready = _backwards.get(key)
    if ready is None:
        planned = plan.backward_plan(problem, wanted)
        if steps.is_interpreted(planned.total):
            return None
        dtypes = gradient_dtypes(problem, wanted) | {"dresidual_out": problem.h_dtype if has_dresidual_out else None}
        _, rows = steps.row_arguments(problem, {"dy": None, "dresidual_out": None, "h": None})
        scalars = rows | _scalars(problem, planned, inner_rows=1)
        elements = problem.rows * problem.hidden_size
        in_order = {name: dtypes[name] for name in (*_GIVEN, *_SCRATCH)}
        starts = [steps.bind(step, in_order, device, scalars, elements) for step in planned.steps]
        totals = []
        for place, (asked, dtype) in enumerate(zip(wanted[2:], (problem.weight_dtype, problem.bias_dtype), strict=True)):
            if asked:
                given = {"partial": "float32", "total": dtype}, device, {"programs": planned.parts}
                totals.append((place, steps.bind(planned.total, *given, planned.parts * problem.hidden_size)))
        make = [shape and allocate.maker(shape, torch.float32, device) for shape in _scratch(problem, wanted, planned)]
        if len(_backwards) >= steps.MOST:
            _backwards.clear()
        ready = _backwards[key] = partial(_start, starts, totals, make)
    return ready


def _start(
    starts: list[Start],
    totals: list[tuple[int, Start]],
    make: list[Callable[[], Tensor] | None],
    addresses: tuple[int, ...],
) -> None:
    scratch = [new and new() for new in make]
    sums = steps.addresses_of(scratch)
    for start in starts:
        start(addresses[: len(_GIVEN)] + sums)
    for place, start in totals:
        start((sums[place], addresses[len(_GIVEN) + place]))


def _scratch(problem: Problem, wanted: Wanted, planned: plan.BackwardPlan) -> list[tuple[int, int] | None]:
    """Return the shapes, in float32, of the partial sums of dweight and dbias, then of what blocks of a row sum up."""
    partials, shares = (planned.parts, problem.hidden_size), (problem.rows, planned.blocks)
    return [
        partials if wanted.dweight else None,
        partials if wanted.dbias else None,
        shares if planned.blocks else None,
        shares if planned.blocks and problem.spec.subtract_mean else None,
    ]


def _launch(
    problem: Problem,
    wanted: Wanted,
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    gradients: Gradients,
) -> None:
    planned = plan.backward_plan(problem, wanted)
    scratch = [steps.new(h, shape, "float32") if shape else None for shape in _scratch(problem, wanted, planned)]
    dweight, dbias, x_hat_g, g = scratch
    if problem.rows:
        inner_rows, rows = steps.row_arguments(problem, {"dy": dy, "dresidual_out": dresidual_out, "h": h})
        arguments = rows | {"weight_ptr": weight, "mean_ptr": mean, "rstd_ptr": rstd, "x_hat_g_ptr": x_hat_g, "g_ptr": g}
        arguments |= {"dx_ptr": gradients.dx, "dresidual_ptr": gradients.dresidual, "dweight_ptr": dweight, "dbias_ptr": dbias}
        arguments |= _scalars(problem, planned, inner_rows)
        for step in planned.steps:
            steps.launch(step, arguments)
    for sums, total in ((dweight, gradients.dweight), (dbias, gradients.dbias)):
        if total is not None:
            steps.launch(planned.total, {"partial_ptr": sums, "total_ptr": total, "programs": planned.parts})


def _scalars(problem: Problem, planned: plan.BackwardPlan, inner_rows: int) -> dict[str, Any]:
    return {
        "rows": problem.rows,
        "rows_per_program": planned.rows_per_program,
        "inner_rows": inner_rows,
        "weight_offset": float(problem.spec.weight_offset),
    }
