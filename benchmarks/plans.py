# SPDX-License-Identifier: Apache-2.0
"""Would a kernel be faster by another plan? Every launch with half and twice the warps, rows and columns of the planned one.

    python -m benchmarks.plans --output benchmarks/results/plans.csv --hidden-sizes 4096 16384 --passes forward backward

Each alternative changes one of the launches that a call makes, and is verified, then timed as a contestant of `normkit bench`
next to the plan, by events around the launches alone. The thresholds of normkit/plan.py are chosen by this.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from normkit import kernels
from normkit.bench import circumstances, gpu, report, with_torch
from normkit.bench.command import GPU_ELEMENTS, HIDDEN_SIZES
from normkit.bench.compete import Row, compete
from normkit.bench.contest import DTYPES, Arrays, Case, Contest, Program
from normkit.bench.contestants import Contestant, copy
from normkit.errors import NormkitError
from normkit.interface import Wanted
from normkit.plan import Step
from normkit.spec import KINDS
from normkit_torch import launch, steps
from normkit_torch.device import platform_of

from .calls import interpret, launching_by

PASSES = ("forward", "in-place", "backward")
PLANNED = "planned"
# More registers than a thread has: such a plan spills, and takes long to compile.
MOST_ELEMENTS_OF_A_THREAD = 128

Launch = tuple[Step, dict[str, Any]]
Change = Callable[[Step], Step]


def launches(contest: Contest, tensors: Arrays) -> tuple[list[Launch], dict[str, Any]]:
    """Return the launches of a call, which are not made, and the results that they would write, by name."""
    platform, arch = platform_of(tensors.x.device)
    backward = contest.pass_ == "backward"
    problem = replace(contest.problem, platform=platform, arch=arch, needs_grad=backward, in_place=contest.pass_ == "in-place")
    given = tensors[:4]
    saved: Any = launch.forward(problem, *given) if backward else None
    found: list[Launch] = []
    with launching_by(lambda step, arguments: found.append((step, dict(arguments)))):
        if backward:
            rows = tensors.dy, tensors.dresidual_out, saved.residual_out
            gradients = launch.backward(problem, Wanted.by(problem), *rows, tensors.weight, saved.mean, saved.rstd)
            results = dict(zip(("dx", "dresidual", "dweight", "dbias"), gradients.by_operand(problem), strict=True))
        elif problem.in_place:
            launch.forward_(problem, *given)
            results = {"y": tensors.x, "residual_out": tensors.residual}
        else:
            results = launch.forward(problem, *given)._asdict()
    assert found, "a call launches something"
    return found, {name: tensor for name, tensor in results.items() if tensor is not None}


def program(change: Change, contest: Contest) -> Program:
    """Return the launches of a contest, changed, as the program of a contestant."""

    def ready(tensors: Arrays) -> Callable[[], dict[str, Any]]:
        planned, results = launches(contest, tensors)
        changed = [(change(step), arguments) for step, arguments in planned]

        def call() -> dict[str, Any]:
            for step, arguments in changed:
                steps.launch(step, arguments)
            return results

        return call

    front_end = with_torch.normkit_torch(contest)
    return Program(front_end.put, ready, lambda tensors, returned: returned, front_end.reset)


def alternatives(step: Step, rows: int) -> Iterator[tuple[str, Step]]:
    """Yield steps with half and twice as much of what the plan chose, by what was changed."""
    blocks: dict[str, int] = {name: int(step.constants[name]) for name in ("BLOCK_M", "BLOCK_N") if name in step.constants}
    # a block that holds whole rows cannot be shorter, and a longer one would hold nothing more
    tuned = [name for name, size in blocks.items() if name == "BLOCK_M" or size < int(step.constants["HIDDEN"])]
    for factors in itertools.product((0.5, 1, 2), repeat=1 + len(tuned)):
        num_warps = int(step.num_warps * factors[0])
        sizes = blocks | {name: int(blocks[name] * factor) for name, factor in zip(tuned, factors[1:], strict=True)}
        held = math.prod(sizes.values())
        if "PIECES" in step.constants:
            # as many as make up the row, two of which are looked at at once
            sizes["PIECES"] = int(step.constants["PIECES"]) * blocks["BLOCK_N"] // sizes["BLOCK_N"] // 2 * 2
            held *= sizes["PIECES"]
        fits = held <= MOST_ELEMENTS_OF_A_THREAD * 32 * num_warps
        if fits and num_warps <= 32 and all(sizes.values()) and set(factors) != {1}:
            other = with_constants(step, step.constants | sizes, num_warps, rows)
            yield described(other), other


def described(step: Step) -> str:
    """Return kernel, warps and blocks of a step."""
    blocks = [f"{name}={step.constants[name]}" for name in ("BLOCK_M", "BLOCK_N") if name in step.constants]
    return " ".join((step.kernel, f"num_warps={step.num_warps}", *blocks))


def with_constants(step: Step, constants: dict[str, Any], num_warps: int, rows: int) -> Step:
    """Return a step with other constants, and the grid that goes with them.

    An axis of the grid that covers the rows, or the columns, by blocks covers them by the new blocks. Programs that are given
    how many rows are theirs stay as many.
    """
    names = getattr(kernels, step.kernel).arg_names

    def axis(programs: int) -> int:
        for size, block, covers in (
            (rows, "BLOCK_M", "rows" in names and "rows_per_program" not in names),
            (int(constants["HIDDEN"]), "BLOCK_N", programs != rows and "PIECES" not in constants),
        ):
            if covers and block in constants and programs == -(-size // int(step.constants[block])):
                return -(-size // int(constants[block]))
        return programs

    return replace(step, grid=tuple(map(axis, step.grid)), constants=constants, num_warps=num_warps)


def contestants(contest: Contest, steps: Sequence[Step]) -> list[Contestant]:
    """Return the plan, all alternatives to some of its steps, and the copy."""
    found = [Contestant(PLANNED, "torch", partial(program, lambda step: step), ours=True)]
    for step in steps:
        for name, other in alternatives(step, contest.case.rows):
            found.append(Contestant(name, "torch", partial(program, partial(_instead, step, other))))
    return [*found, copy()]


def _instead(of: Step, other: Step, step: Step) -> Step:
    return other if step == of else step


def verdict(contest: Contest, rows: Sequence[Row]) -> str:
    """Return in a line how long the plan takes, and what would be faster: right, and p80 under the plan's p20."""
    own = next(row for row in rows if row.contestant == PLANNED)
    others = [row for row in rows if row.within_bounds == "yes" and row.us_p80 < own.us_p20]
    faster = [
        f"{row.contestant} {own.us_median / row.us_median:.2f} x" for row in sorted(others, key=lambda row: row.us_median)
    ]
    return f"{contest}: {own.us_median:.1f} us, {own.percent_of_copy:.0f} % of copy; faster: {', '.join(faster[:3]) or 'none'}"


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; return 1 if a contest failed."""
    parser = argparse.ArgumentParser(description="would a kernel be faster by another plan?")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="CSV file to write")
    add("--hidden-sizes", nargs="+", type=int, default=HIDDEN_SIZES, help="default: those of normkit bench --device cuda")
    add("--elements", type=int, default=GPU_ELEMENTS, help="of x, which say how many rows there are (default: %(default)s)")
    add("--passes", nargs="+", choices=PASSES, default=PASSES, help="default: all")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[1:2], help="default: bfloat16")
    add("--without", nargs="+", metavar="KERNEL", default=(), help="kernels that are not varied")
    add("--seconds", type=float, default=0.05, help="for each alternative, about (default: %(default)s)")
    add("--tiny", action="store_true", help="2 short rows, interpreted on the processor; such times mean nothing")
    options = parser.parse_args(arguments)
    if options.tiny:
        interpret(parser)
    try:
        where = gpu.stand_in() if options.tiny else gpu.cuda()
    except NormkitError as error:
        parser.error(str(error))
    elements, sizes = (256, [128]) if options.tiny else (options.elements, options.hidden_sizes)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = report.Writer(file, circumstances.collect() | dict(where.facts))
        for size, pass_, kind, dtype in itertools.product(sizes, options.passes, options.kinds, options.dtypes):
            contest = Contest(Case(max(1, elements // size), size), dtype, kind, pass_, "device")
            try:
                steps = {step.kernel: step for step, _ in launches(contest, where.arrays(contest, 0))[0]}
                varied = [step for name, step in steps.items() if name not in options.without]
                rows, absent = compete(contest, contestants(contest, varied), where, seconds=options.seconds)
            # Any exception: the other sizes shall be measured all the same, and this one is reported.
            except Exception as failure:  # noqa: BLE001
                failed += 1
                print(f"{contest}: FAILED: {type(failure).__name__}: {failure}", flush=True)
                continue
            writer.write(rows)
            print(verdict(contest, rows), *map(described, steps.values()), sep="\n  ", flush=True)
            for each in absent:
                print(f"  not run: {each.contestant}: {each.reason}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
