# SPDX-License-Identifier: Apache-2.0
"""What a planned step may use of a multiprocessor, and how often it moves what; the tests hold the code to it."""

from __future__ import annotations

from collections.abc import Mapping

from normkit.plan import BackwardPlan, Step
from normkit.spec import Problem

# Shared memory of a multiprocessor, in bytes: the least of the compute capabilities from 8.0 on that have 64 Ki registers and
# Triton kernels, of which a program costs 1 KiB itself; AMD's LDS of a compute unit.
SHARED_MEMORY = {"cuda": 163 * 1024, "rocm": 64 * 1024}


def registers(step: Step, platform: str) -> int:
    """Return the most 32-bit registers of a thread with which `step.programs` programs share a multiprocessor.

    Args:
        step: as planned.
        platform: "rocm" has lanes of 512 registers on each of four parts of a compute unit; others as NVIDIA has.
    """
    if platform == "rocm":
        waves = -(-step.programs * step.num_warps // 4)
        return 512 // waves // 8 * 8
    return min(255, 65536 // (32 * step.num_warps * step.programs) // 8 * 8)


def shared_memory(step: Step, platform: str) -> int:
    """Return the most bytes of shared memory of a program with which `step.programs` programs share a multiprocessor."""
    own = 0 if platform == "rocm" else 1024
    return SHARED_MEMORY["rocm" if platform == "rocm" else "cuda"] // step.programs - own


def reads(step: Step, present: Mapping[str, object]) -> dict[str, int]:
    """Return how often a step reads each element of each array that has rows; once, where it is not said otherwise.

    Args:
        step: as planned.
        present: the arrays that there are, by name; others are None or absent.
    """
    dh = any(present.get(name) is not None for name in ("dx", "dresidual", "x_hat_g"))
    x_hat = dh or present.get("dweight") is not None
    often = {
        "forward_rows": lambda: dict.fromkeys(("x", "residual"), 1 + bool(step.constants["AGAIN"])),
        "forward_long": lambda: (
            {"x": 1, "residual": 1, "residual_out": 1} if step.constants["READ_BACK"] else {"x": 2, "residual": 2}
        ),
        "backward_rows": lambda: {"dy": 1, "h": 1, "dresidual_out": int(dh)},
        "backward_twice": lambda: {"dy": 1 + dh, "h": 1 + dh, "dresidual_out": int(dh)},
        "backward_columns": lambda: {"dy": 1, "h": int(x_hat)},
        "backward_long": lambda: {"dy": 1, "h": 1, "dresidual_out": 1},
        "sum_partials": lambda: {"partial": 1},
    }[step.kernel]()
    return {name: times for name, times in often.items() if present.get(name) is not None}


def scratch_bytes(problem: Problem, planned: BackwardPlan) -> int:
    """Return the bytes that the steps of a backward pass hand to one another: each is written once, and read at least once.

    Partial sums of dweight and dbias for each part of the rows; and for rows longer than a program holds, their shares of the
    sums over each row.
    """
    sums = (problem.weight_dtype is not None) + (problem.bias_dtype is not None)
    shares = planned.blocks * (2 if problem.spec.subtract_mean else 1)
    return 4 * (planned.parts * problem.hidden_size * sums + problem.rows * shares)
