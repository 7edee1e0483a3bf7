# SPDX-License-Identifier: Apache-2.0
"""No kernel touches memory that is not its own, every result is written, and no element moves more often than it has to."""

from __future__ import annotations

import numpy as np
import pytest

from normkit import plan

from ..cases import Case, tagged
from ..frameworks import Torch
from ..interpreter import Launch, watch

TORCH = Torch()
CASES = [case for case in tagged("ci") if plan.supports(case.problem()) is None]
OUTPUTS = {
    "forward_rows": ("y", "residual_out", "mean", "rstd"),
    "forward_long": ("y", "residual_out", "mean", "rstd"),
    "backward_rows": ("dx", "dresidual", "dweight", "dbias"),
    "backward_twice": ("dx", "dresidual", "dweight", "dbias"),
    "backward_long": ("dx", "dresidual"),
    "backward_columns": ("x_hat_g", "g", "dweight", "dbias"),
    "sum_partials": ("total",),
}


def check_traffic(launch: Launch, rounding: str | None = None) -> None:
    """Check that a launch moved what its kernel has to, and nothing else."""
    residual_out = launch.tensors.get("residual_out")
    rounds = rounding in (None, "sum") and residual_out is not None and residual_out.dtype.itemsize < 4
    third_pass = launch.kernel == "forward_long" and rounds and "rstd" in launch.tensors
    for name in launch.tensors:
        if name in OUTPUTS[launch.kernel]:
            assert launch.unwritten(name) == []
            assert (launch.writes(name) == 1).all(), name
            assert not launch.reads(name).any(), name
        else:
            assert not launch.writes(name).any(), name
            times = READS[launch.kernel].get(name)
            assert times is None or (launch.reads(name) == times + third_pass).all(), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_element_moves_as_often_as_it_must(case: Case) -> None:
    arrays = {name: TORCH.array(array) for name, array in case.arrays().items()}
    with watch() as launches:
        TORCH.gradients(case, arrays, "triton")
    problem = case.problem(platform="cuda", needs_grad=True)
    long = problem.hidden_size > plan.BACKWARD_LONGEST_ROW
    names = [plan.forward_plan(problem).kernel, *(["backward_long", "backward_columns"] if long else ["backward_rows"])]
    names = names if problem.rows else []
    assert [launch.kernel for launch in launches if launch.kernel != "sum_partials"] == names
    assert [launch.kernel for launch in launches].count("sum_partials") == (case.weight is not None) + (case.bias is not None)
    for launch in launches:
        check_traffic(launch, case.rounding)


def test_without_a_backward_no_statistics_are_written() -> None:
    case = next(case for case in CASES if case.name == "gpt_2")
    arrays = {name: TORCH.array(array) for name, array in case.arrays().items()}
    with watch() as launches:
        TORCH.call(case, arrays, "triton")
    (launch,) = launches
    check_traffic(launch)
    assert set(launch.tensors) == {"x", "residual", "weight", "bias", "y", "residual_out"}


@pytest.mark.parametrize("hidden_size", [512, 9000])
@pytest.mark.parametrize("asks", [("x",), ("weight",), ("bias",), ("residual",), ("weight", "bias")], ids="_".join)
def test_a_gradient_that_nobody_asks_for_is_not_computed(asks: tuple[str, ...], hidden_size: int) -> None:
    import torch

    case = Case("asks", "layer", (3, hidden_size), x="float32", residual="bfloat16", bias="bfloat16")
    arrays = {name: TORCH.array(array) for name, array in case.arrays().items()}
    for name in asks:
        arrays[name].requires_grad_()
    y, _ = TORCH.call(case, arrays, "triton")
    with watch() as launches:
        torch.autograd.grad(y, [arrays[name] for name in asks], arrays["dy"])
    written = {name for launch in launches for name in launch.tensors if name in OUTPUTS[launch.kernel]} - {"total"}
    assert written == {f"d{name}" for name in asks}
    for launch in launches:
        outputs = [name for name in launch.tensors if name in OUTPUTS[launch.kernel]]
        assert all((launch.writes(name) == 1).all() for name in outputs)
        # the sum of dy alone needs nothing of h
        assert outputs != ["dbias"] or launch.kernel != "backward_columns" or not launch.reads("h").any()


def test_the_parameters_are_read_once_by_each_program() -> None:
    case = next(case for case in CASES if case.name == "hidden_31")
    arrays = {name: TORCH.array(array) for name, array in case.arrays().items()}
    with watch() as launches:
        TORCH.call(case, arrays, "triton")
    assert np.unique(launches[0].reads("weight")).tolist() == [launches[0].grid[0]]
    assert np.unique(launches[0].reads("bias")).tolist() == [launches[0].grid[0]]
