# SPDX-License-Identifier: Apache-2.0
"""What is left to do in a call of PyTorch like one before: vendors' operators take its tensors and make their own results."""

from __future__ import annotations

from typing import Any

from ..interface import Guarded, Run
from ..prepared import guard, picking
from .exchange import Compute, Given, Results


def on_tensors(guarded: Guarded, compute: Compute) -> Run:
    """Return what computes calls like one before with a vendor's operators."""
    problem, written, count_as_written = guarded.problem, guarded.written, guarded.count_as_written
    like_then, written_of = guard(guarded), picking(written)
    spec, shape, in_place = problem.spec, problem.shape, problem.in_place
    flat = None if len(shape) == 2 else (problem.rows, problem.hidden_size)

    def run(tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if like_then(tensors) is None:
            return None
        x, residual, weight, bias, _, _ = tensors
        rows = (x, residual) if flat is None else (x.view(flat), residual if residual is None else residual.view(flat))
        results = compute(spec, Given(*rows, weight, bias), Results(*rows) if in_place else None)
        if written:
            count_as_written(written_of(tensors))
        if in_place:
            return x, residual, None, None, problem
        y, residual_out = results
        if flat is not None:
            y, residual_out = y.view(shape), residual_out if residual_out is None else residual_out.view(shape)
        return y, residual_out, None, None, problem

    return run
