# SPDX-License-Identifier: Apache-2.0
"""What a call costs on the host before a kernel runs: Triton's own launch, and normkit's functions around the same kernel.

    python -m benchmarks.launch --output benchmarks/results/launch.csv

On a machine with a GPU this is the time until a call returns, with the GPU's queue emptied between calls every now and then,
and torch's own operators beside it. Without one, a driver takes its place that compiles for sm_90 and launches nothing: all
times are then those of Python. All ways are timed in turn, as `normkit bench` does, on few rows, so that no kernel is waited
for.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normkit_torch
from normkit import plan
from normkit.bench import circumstances
from normkit.bench.measure import Times, by_clock, interleaved
from normkit.interface import Forward, Wanted
from normkit.spec import Problem
from normkit_torch import launch, launch_backward, prepared, steps

Call = Callable[[], Any]
COLUMNS: tuple[str, ...] = (
    "pass",
    "way",
    "rows",
    "hidden_size",
    "dtype",
    "us_p20",
    "us_median",
    "us_p80",
    "samples",
    "ratio_to_jit",
)
COLUMNS += ("driver", "torch", "triton", "python", "processor", "commit", "date")
JIT = "Triton's own launch"
# as many as are in a graph
NORMS = 8
# calls after which the queue of a GPU is emptied, which has room for some more
QUEUED = 64


class Tensors:
    """The operands and results of one call."""

    def __init__(self, rows: int, hidden_size: int, device: str) -> None:
        make = partial(torch.ones, dtype=torch.bfloat16, device=device)
        self.x, self.residual, self.y, self.residual_out, self.dy, self.dresidual_out = (
            make(rows, hidden_size) for _ in range(6)
        )
        self.weight = make(hidden_size)


def in_place(given: Tensors) -> dict[str, Call]:
    """Return the ways to add and normalise in place."""
    normkit_torch.add_rms_norm_(given.x, given.residual, given.weight, implementation="triton")
    out = Forward(given.x, given.residual, None, None)
    (problem,) = [ready.problem for alike in prepared._calls.values() for ready in alike if ready.problem.in_place]
    compiled: Any = torch.compile(normkit_torch.add_rms_norm_, fullgraph=True, backend=_backend(given.x))
    tensors = given.x, given.residual, given.weight
    return {
        JIT: _jit(plan.forward_plan(problem), launch._forward_arguments(problem, *tensors, None, out)),
        "add_rms_norm_": lambda: normkit_torch.add_rms_norm_(*tensors),
        "its operator": lambda: torch.ops.normkit.norm_(*tensors, None, "add_rms_norm_", 1e-6, 0.0),
        "add_rms_norm_ in torch.compile": lambda: compiled(*tensors),
    }


def forward(given: Tensors) -> dict[str, Call]:
    """Return the ways to add and normalise, with results in memory of their own."""
    tensors = given.x, given.residual, given.weight
    normkit_torch.add_rms_norm(*tensors, implementation="triton")
    (problem,) = [ready.problem for alike in prepared._calls.values() for ready in alike if not ready.problem.in_place]
    out = Forward(given.y, given.residual_out, None, None)
    own = _jit(plan.forward_plan(problem), launch._forward_arguments(problem, *tensors, None, out))
    compiled: Any = torch.compile(normkit_torch.add_rms_norm, fullgraph=True, backend=_backend(given.x))
    ways: dict[str, Call] = {
        JIT: own,
        f"two empty_like, {JIT}": lambda: (torch.empty_like(given.x), torch.empty_like(given.x), own()),
        "add_rms_norm, out= and residual_out=": partial(
            normkit_torch.add_rms_norm, *tensors, out=given.y, residual_out=given.residual_out
        ),
        "add_rms_norm": lambda: normkit_torch.add_rms_norm(*tensors),
        "its operator": lambda: torch.ops.normkit.norm_and_residual(*tensors, None, "add_rms_norm", 1e-6, 0.0),
        "add_rms_norm in torch.compile": lambda: compiled(*tensors),
    }
    if given.x.is_cuda:
        ways["torch.add, rms_norm"] = lambda: F.rms_norm(given.x + given.residual, given.x.shape[-1:], given.weight, 1e-6)
    return ways


def in_a_graph(given: Tensors) -> dict[str, Call]:
    """Return the ways to compute NORMS norms in a row, as the residual stream of a model does, and what one alone costs."""
    normkit_torch.add_rms_norm(given.x, given.residual, given.weight, implementation="triton")
    (problem,) = [ready.problem for alike in prepared._calls.values() for ready in alike]
    out = Forward(given.y, given.residual_out, None, None)
    arguments = launch._forward_arguments(problem, given.x, given.residual, given.weight, None, out)
    own = _jit(plan.forward_plan(problem), arguments)

    def stream(x: Tensor, residual: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        for weight in weights:
            x, residual = normkit_torch.add_rms_norm(x, residual, weight)
        return x, residual

    def training(stream: Callable[..., Any]) -> Any:
        results = stream(*leaves[:2], leaves[2:])
        return torch.autograd.grad(results, leaves, (given.dy, given.dresidual_out))

    compiled: Any = torch.compile(stream, fullgraph=True, dynamic=False, backend="inductor")
    weights = [given.weight.clone() for _ in range(NORMS)]
    leaves = [tensor.clone().requires_grad_() for tensor in (given.x, given.residual, *weights)]
    return {
        f"{JIT}, {NORMS} times": lambda: [own() for _ in range(NORMS)],
        f"add_rms_norm, {NORMS} times": lambda: stream(given.x, given.residual, weights),
        f"{NORMS} in torch.compile": lambda: compiled(given.x, given.residual, weights),
        "1 in torch.compile": lambda: compiled(given.x, given.residual, weights[:1]),
        f"add_rms_norm, {NORMS} times, and the gradients": lambda: training(stream),
        f"{NORMS} in torch.compile, and the gradients": lambda: training(compiled),
    }


def unseen(given: Tensors) -> dict[str, Callable[[int], Call]]:
    """Return a call with a number of rows that none had before."""
    x, residual = (torch.ones(2**20, 128, dtype=torch.bfloat16, device=given.x.device) for _ in range(2))
    weight, counts = torch.ones_like(x[0]), iter(range(1, 2**20))

    def ready(_: int) -> Call:
        count = next(counts)
        rows = x[:count], residual[:count], weight
        return lambda: normkit_torch.add_rms_norm_(*rows)

    return {"add_rms_norm_, rows never seen": ready}


def backward(given: Tensors) -> dict[str, Call]:
    """Return the ways to compute the gradients of x, which is the residual's too, and weight."""
    leaves = [tensor.clone().requires_grad_() for tensor in (given.x, given.residual, given.weight)]
    results = normkit_torch.add_rms_norm(*leaves, implementation="triton")
    (problem,) = [ready.problem for alike in prepared._calls.values() for ready in alike if ready.problem.needs_grad]
    wanted = Wanted.by(problem, True, True, True, False)
    rstd = torch.ones(given.x.shape[:-1], device=given.x.device)
    tensors = given.dy, given.dresidual_out, given.residual_out, given.weight, None, rstd
    return {
        f"{JIT} of each": _jit_backward(problem, wanted, given, rstd),
        "the implementation": lambda: launch.backward(problem, wanted, *tensors),
        "torch.autograd.grad": lambda: torch.autograd.grad(results, leaves, (given.dy, given.dresidual_out), retain_graph=True),
    }


def _jit(step: plan.Step, arguments: Mapping[str, Any]) -> Call:
    from normkit import kernels

    kernel = getattr(kernels, step.kernel)
    given = [step.constants[name] if name in step.constants else arguments[name] for name in kernel.arg_names]
    return lambda: kernel[step.grid](*given, num_warps=step.num_warps, enable_fp_fusion=True)


def _jit_backward(problem: Problem, wanted: Wanted, given: Tensors, rstd: Tensor) -> Call:
    planned = plan.backward_plan(problem, wanted)
    _, rows = steps.row_arguments(problem, {"dy": given.dy, "dresidual_out": given.dresidual_out, "h": given.residual_out})
    partials = given.x.new_empty((planned.parts, problem.hidden_size), dtype=torch.float32)
    arguments = rows | launch_backward._scalars(problem, planned, 1)
    arguments |= {"weight_ptr": given.weight, "mean_ptr": None, "rstd_ptr": rstd, "dx_ptr": given.y, "dresidual_ptr": None}
    arguments |= {"dweight_ptr": partials, "dbias_ptr": None}
    total = {"partial_ptr": partials, "total_ptr": torch.empty_like(given.weight), "programs": planned.parts}
    launches = [*(_jit(step, arguments) for step in planned.steps), _jit(planned.total, total)]
    return lambda: [start() for start in launches]


def _backend(x: Tensor) -> str:
    # inductor would compile C++ for what are CPU tensors without a GPU
    return "inductor" if x.is_cuda else "aot_eager"


def _again(call: Call, device: str, index: int) -> Call:
    if device == "cuda" and not index % QUEUED:
        torch.cuda.synchronize()
    return call


def measured(rows: int, hidden_size: int, seconds: float, device: str) -> dict[str, dict[str, Times]]:
    """Return the times by pass and way."""
    found = {}
    for name, ways in (("in-place", in_place), ("forward", forward), ("backward", backward), ("graph", in_a_graph)):
        prepared.forget()
        given = Tensors(rows, hidden_size, device)
        contestants: dict[str, Any] = {way: partial(_again, call, device) for way, call in ways(given).items()}
        if name == "in-place":
            contestants |= unseen(given)
        found[name] = interleaved({way: by_clock(ready) for way, ready in contestants.items()}, seconds)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="what a call costs on the host")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way, about")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=4096)
    options = parser.parse_args(arguments)
    driver: AbstractContextManager[object]
    if torch.cuda.is_available():
        device, name, driver = "cuda", torch.cuda.get_device_name(), nullcontext()
    else:
        from tests.fake_driver import fake_driver

        device, name, driver = "cpu", "none: nothing is launched", fake_driver(record=False)
    about = circumstances.collect() | {"triton": version("triton"), "driver": name}
    with driver:
        times = measured(options.rows, options.hidden_size, options.seconds, device)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for which, ways in times.items():
            own = next(iter(ways.values())).median
            for way, taken in ways.items():
                low, median, high = (f"{1e6 * each:.2f}" for each in taken[:3])
                row = (which, way, options.rows, options.hidden_size, "bfloat16", low, median, high, taken.samples)
                ratio = f"{taken.median / own:.2f}"
                writer.writerow((*row, ratio, *(about[column] for column in COLUMNS[len(row) + 1 :])))
                print(f"{which:<9} {way:<48} {median:>8} us  ({low} to {high})  {ratio} of Triton's own")


if __name__ == "__main__":
    main()
