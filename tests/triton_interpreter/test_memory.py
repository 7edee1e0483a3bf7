# SPDX-License-Identifier: Apache-2.0
"""No kernel touches memory that is not its own, every result is written, and no element moves more often than it has to."""

from __future__ import annotations

import numpy as np
import pytest

from normkit import plan
from normkit.bench.traffic import moved_bytes
from normkit.interface import Wanted

from ..cases import Case, tagged
from ..frameworks import Torch
from ..interpreter import Launch, watch
from ..resources import reads, scratch_bytes

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


def check_traffic(launch: Launch) -> None:
    """Check that a launch moved what its step says, and nothing else."""
    stated = reads(launch.step, launch.tensors)
    for name in launch.tensors:
        written = name in OUTPUTS[launch.kernel]
        assert (launch.writes(name) == written).all(), name
        if written or name in stated:
            assert (launch.reads(name) == stated.get(name, 0)).all(), name


def footprint(launches: list[Launch]) -> int:
    """Return the bytes that are read at all, each once for all launches, and those that are written."""
    seen: dict[int, int] = {}
    written = 0
    for launch in launches:
        for name, tensor in launch.tensors.items():
            written += int(launch.writes(name).sum()) * tensor.element_size()
            if launch.reads(name).any() and tensor.numel():
                seen[tensor.data_ptr()] = int((launch.reads(name) > 0).sum()) * tensor.element_size()
    return written + sum(seen.values())


def read_back(launch: Launch) -> int:
    """Return the bytes of results that the launch reads itself."""
    outputs = [launch.tensors[name] for name in reads(launch.step, launch.tensors) if name in OUTPUTS[launch.kernel]]
    return sum(tensor.numel() * tensor.element_size() for tensor in outputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_element_moves_as_often_as_it_must(case: Case) -> None:
    arrays = {name: TORCH.array(array) for name, array in case.arrays().items()}
    with watch() as launches:
        TORCH.gradients(case, arrays, "triton")
    problem = case.problem(platform="cuda", needs_grad=True)
    planned = plan.backward_plan(problem, Wanted.by(problem))
    steps = [plan.forward_plan(problem), *planned.steps] if problem.rows else []
    totals = (case.weight is not None) + (case.bias is not None)
    assert [launch.step for launch in launches] == steps + [planned.total] * totals
    for launch in launches:
        check_traffic(launch)
    if problem.rows:
        forward, backward = footprint(launches[:1]), footprint(launches[1:])
        apart = moved_bytes(problem, "forward") + moved_bytes(problem, "backward")
        statistics = moved_bytes(problem, "forward-and-backward") - apart
        assert forward == moved_bytes(problem, "forward") + statistics + read_back(launches[0])
        assert backward == moved_bytes(problem, "backward") + 2 * scratch_bytes(problem, planned)


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
    written = {name for launch in launches for name in launch.tensors if name in OUTPUTS[launch.kernel]}
    written -= {"total", "x_hat_g", "g"}
    assert written == {f"d{name}" for name in asks}
    assert {"x", "residual"} & {*asks} or not any("x_hat_g" in launch.tensors for launch in launches)
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
