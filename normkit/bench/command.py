# SPDX-License-Identifier: Apache-2.0
"""`normkit bench`: options, and from options to table, CSV and plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..errors import NormkitError, OptionError
from ..models import require
from ..spec import KINDS
from . import circumstances, plot, report
from .compete import Absent, Row, compete
from .contest import DTYPES, PASSES, Case, Contest
from .contestants import COPY, FRAMEWORKS, TABLE, Contestant, copy
from .measure import ROUNDS
from .verify import WrongResultError

CASES = ("1x4096", "4x4096", "16x4096", "512x4096", "4096x4096", "64x16384", "4096x128")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `normkit bench` to a parser."""
    names = [contestant.name for contestant in TABLE]
    parser.epilog = "It times the processor only; what there is for GPUs is in the folder benchmarks of the sources."
    add = parser.add_argument
    add("--cases", nargs="+", default=CASES, metavar="ROWSxHIDDEN", help=f"default: {' '.join(CASES)}")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:2], help=f"default: {' '.join(DTYPES[:2])}")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    add("--passes", nargs="+", choices=PASSES, default=PASSES, help="default: all")
    add("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS, help="default: all that are installed")
    add("--contestants", nargs="+", metavar="NAME", help=f"of {', '.join(names)}; the copy is always there (default: all)")
    add("--threads", type=int, help="processors to use, for all frameworks (default: all)")
    add("--seconds", type=float, default=0.5, help="for each contestant in each contest, about (default: %(default)s)")
    add("--csv", type=Path, metavar="FILE", help="write all columns to this file")
    add("--plot", type=Path, metavar="FILE", help="draw percent of the copy's bandwidth by hidden size, as .png or .svg")
    add("--read", type=Path, metavar="FILE", help="measure nothing: table, summary and plot of this CSV file")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0, 1 if a result of normkit is wrong, 2 if the benchmark could not run.
    """
    try:
        return _run(arguments)
    except NormkitError as error:
        print(f"normkit bench: {error}", file=sys.stderr)
        return 1 if isinstance(error, WrongResultError) else 2


def chosen(frameworks: Sequence[str], names: Sequence[str] | None) -> list[Contestant]:
    """Return the contestants that were asked for, and the copy.

    Raises:
        OptionError: there is none of a name, or none of the frameworks.
    """
    known = [contestant.name for contestant in TABLE]
    for name in names or ():
        if name not in known:
            raise OptionError(f"--contestants {name}: there is no such contestant; there are {', '.join(known)}")
    found = [each for each in TABLE if each.framework in frameworks and (names is None or each.name in names)]
    if not found:
        raise OptionError(f"none of --contestants {' '.join(names or ())} belongs to --frameworks {' '.join(frameworks)}")
    return [*found, copy()]


def _run(arguments: argparse.Namespace) -> int:
    require("tabulate", "tqdm", extra="bench")
    if arguments.plot:
        plot.check(arguments.plot)
    if arguments.read:
        _show(report.read(arguments.read), arguments.plot)
        return 0
    if not arguments.seconds > 0:
        raise OptionError(f"--seconds must be more than 0, got {arguments.seconds}")
    contestants = chosen(arguments.frameworks, arguments.contestants)
    contests = [
        Contest(case, dtype, kind, pass_)
        for pass_ in arguments.passes
        for kind in arguments.kinds
        for dtype in arguments.dtypes
        for case in map(Case.parse, arguments.cases)
    ]
    if arguments.threads is not None:
        circumstances.limit_threads(arguments.threads)
    found = circumstances.collect()
    print("\n".join(f"{name:<22} {value}" for name, value in found.items() if value))
    rows, absent = _measured(contests, contestants, arguments, found)
    missing = report.not_run(absent, len(contests))
    if all(row.contestant == COPY for row in rows):
        raise OptionError(f"there is nothing to measure. {missing}")
    _show(rows, arguments.plot)
    print(f"\n{missing}")
    return 0


def _measured(
    contests: Sequence[Contest], contestants: Sequence[Contestant], arguments: argparse.Namespace, found: dict[str, str]
) -> tuple[list[Row], list[Absent]]:
    (tqdm,) = require("tqdm", extra="bench")
    rows: list[Row] = []
    absent: list[Absent] = []
    with ExitStack() as stack:
        writer = None
        if arguments.csv:
            arguments.csv.parent.mkdir(parents=True, exist_ok=True)
            writer = report.Writer(stack.enter_context(arguments.csv.open("w", newline="", encoding="utf-8")), found)
        # on a terminal only
        bar = stack.enter_context(tqdm.tqdm(total=len(contests) * ROUNDS, unit="round", disable=None))
        for contest in contests:
            bar.set_description(str(contest))
            outcome = compete(
                contest,
                contestants,
                seconds=arguments.seconds,
                cache_bytes=circumstances.cache_bytes(),
                tick=bar.update,
            )
            rows += outcome.rows
            absent += outcome.absent
            if writer:
                writer.write(outcome.rows)
    return rows, absent


def _show(rows: Sequence[Row], picture: Path | None) -> None:
    print(f"\n{report.table(rows)}\n\n{report.summary(rows)}")
    if picture:
        plot.draw(rows, picture)
        print(f"\nDrawn: {picture}")
