# SPDX-License-Identifier: Apache-2.0
"""`normkit bench`: options, and from options to table, CSV and plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..errors import NormkitError, OptionError
from ..models import require
from ..spec import KINDS
from . import circumstances, device, gpu, plot, report
from .compete import Absent, Row, compete
from .contest import CLOCKS, DTYPES, PASSES, Case, Contest
from .contestants import COPY, FRAMEWORKS, TABLE, Contestant, copy
from .measure import ROUNDS

CASES = ("1x4096", "4x4096", "16x4096", "512x4096", "4096x4096", "64x16384", "4096x128")
HIDDEN_SIZES = (128, 512, *(2**exponent for exponent in (*range(10, 19), 20)))
GPU_ELEMENTS = 2**27
"""Of x, so that forward and backward move 1 GiB in bfloat16, many times what a GPU's cache holds."""
DECODE_CASES = tuple(f"{rows}x{hidden}" for hidden in (4096, 8192) for rows in (1, 2, 4, 8, 16, 32, 64))
"""Cases of few rows, for --clocks graph host."""


class _Usual(NamedTuple):
    """What is measured on a device where options say nothing else."""

    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    passes: tuple[str, ...]
    frameworks: tuple[str, ...]
    clocks: tuple[str, ...]


USUAL = {
    "cpu": _Usual(CASES, DTYPES[:2], PASSES, FRAMEWORKS, ("host",)),
    "cuda": _Usual(
        tuple(f"{GPU_ELEMENTS // size}x{size}" for size in HIDDEN_SIZES), ("bfloat16",), PASSES[:3], ("torch",), ("device",)
    ),
}


class _Measured(NamedTuple):
    rows: list[Row]
    absent: list[Absent]
    failures: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `normkit bench` to a parser."""
    names = [contestant.name for contestant in TABLE]
    usual = {name: " ".join(USUAL["cpu"][place]) for place, name in enumerate(_Usual._fields)}
    parser.epilog = (
        "On a GPU the usual cases move 1 GiB each, at hidden sizes from 128 to 1048576, in bfloat16. "
        f"Decoding: --cases {' '.join(DECODE_CASES)} --passes forward in-place --clocks graph host"
    )
    add = parser.add_argument
    add("--device", choices=device.NAMES, default="cpu", help="default: %(default)s, for which the defaults below are")
    add("--cases", nargs="+", metavar="ROWSxHIDDEN", help=f"default: {usual['cases']}")
    add("--dtypes", nargs="+", choices=DTYPES, help=f"default: {usual['dtypes']}")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    add("--passes", nargs="+", choices=PASSES, help="default: all")
    add("--clocks", nargs="+", choices=CLOCKS, help="on a GPU; default: device")
    add("--frameworks", nargs="+", choices=FRAMEWORKS, help="default: all that are installed")
    add("--contestants", nargs="+", metavar="NAME", help=f"of {', '.join(names)}; the copy is always there (default: all)")
    add("--threads", type=int, help="processors to use, for all frameworks (default: all)")
    add("--seconds", type=float, default=0.5, help="for each contestant in each contest, about (default: %(default)s)")
    add("--tiny", action="store_true", help="2 short rows, without a GPU, to try all else; such times mean nothing")
    add("--csv", type=Path, metavar="FILE", help="write all columns to this file")
    add("--plot", type=Path, metavar="FILE", help="draw percent of the copy's bandwidth by hidden size, as .png or .svg")
    add("--read", type=Path, metavar="FILE", help="measure nothing: table, summary and plot of this CSV file")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0, 1 if a contest failed or normkit was wrong in one, 2 if the benchmark could not run.
    """
    try:
        return _run(arguments)
    except NormkitError as error:
        print(f"normkit bench: {error}", file=sys.stderr)
        return 2


def chosen(name: str, frameworks: Sequence[str], names: Sequence[str] | None) -> list[Contestant]:
    """Return the contestants for a device that were asked for, and the copy.

    Raises:
        OptionError: there is none of a name, or none of the frameworks.
    """
    of_device = [contestant for contestant in TABLE if name in contestant.devices]
    known = [contestant.name for contestant in of_device]
    for each in names or ():
        if each not in known:
            raise OptionError(f"--contestants {each}: there is no such contestant on {name}; there are {', '.join(known)}")
    found = [each for each in of_device if each.framework in frameworks and (names is None or each.name in names)]
    if not found:
        which = f"--contestants {' '.join(names)}" if names else f"contestants on {name}"
        raise OptionError(f"none of the {which} belongs to --frameworks {' '.join(frameworks)}")
    return [*found, copy()]


def contests(arguments: argparse.Namespace) -> list[Contest]:
    """Return all combinations that options ask for.

    Raises:
        OptionError: a case is none, or a clock cannot time a pass, or there is none such on the device.
    """
    cases, dtypes, passes, _, clocks = _asked(arguments)
    if arguments.device == "cpu" and set(clocks) - {"host"}:
        raise OptionError(f"--clocks {' '.join(clocks)}: on the processor there is only the clock host")
    if "graph" in clocks and set(passes) - {"forward", "in-place"}:
        raise OptionError(f"--clocks graph is for --passes forward in-place, got {' '.join(passes)}")
    parsed = [Case.parse(case) for case in cases]
    if arguments.tiny:
        parsed = list(dict.fromkeys(Case(min(2, case.rows), min(128, case.hidden_size)) for case in parsed))
    return [
        Contest(case, dtype, kind, pass_, clock)
        for clock in clocks
        for pass_ in passes
        for kind in arguments.kinds
        for dtype in dtypes
        for case in parsed
    ]


def _asked(arguments: argparse.Namespace) -> _Usual:
    usual = USUAL[arguments.device]
    return _Usual(*(getattr(arguments, name) or usual[place] for place, name in enumerate(_Usual._fields)))


def _device(arguments: argparse.Namespace) -> device.Device:
    if arguments.device == "cpu":
        return device.processor()
    return gpu.stand_in() if arguments.tiny else gpu.cuda()


def _run(arguments: argparse.Namespace) -> int:
    require("tabulate", "tqdm", extra="bench")
    if arguments.plot:
        plot.check(arguments.plot)
    if arguments.read:
        _show(report.read(arguments.read), arguments.plot)
        return 0
    if not arguments.seconds > 0:
        raise OptionError(f"--seconds must be more than 0, got {arguments.seconds}")
    contestants = chosen(arguments.device, _asked(arguments).frameworks, arguments.contestants)
    all_contests = contests(arguments)
    if arguments.threads is not None:
        circumstances.limit_threads(arguments.threads)
    where = _device(arguments)
    found = circumstances.collect() | dict(where.facts)
    print("\n".join(f"{name:<22} {value}" for name, value in found.items() if value))
    rows, absent, failures = _measured(all_contests, contestants, where, arguments, found)
    missing = report.not_run(absent, len(all_contests))
    if not failures and all(row.contestant == COPY for row in rows):
        raise OptionError(f"there is nothing to measure. {missing}")
    if rows:
        _show(rows, arguments.plot)
    print(f"\n{missing}")
    for failure in failures:
        print(f"normkit bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _measured(
    all_contests: Sequence[Contest],
    contestants: Sequence[Contestant],
    where: device.Device,
    arguments: argparse.Namespace,
    found: dict[str, str],
) -> _Measured:
    (tqdm,) = require("tqdm", extra="bench")
    measured = _Measured([], [], [])
    with ExitStack() as stack:
        writer = None
        if arguments.csv:
            arguments.csv.parent.mkdir(parents=True, exist_ok=True)
            writer = report.Writer(stack.enter_context(arguments.csv.open("w", newline="", encoding="utf-8")), found)
        # on a terminal only
        bar = stack.enter_context(tqdm.tqdm(total=len(all_contests) * ROUNDS, unit="round", disable=None))
        for contest in all_contests:
            bar.set_description(str(contest))
            try:
                rows, absent = compete(contest, contestants, where, seconds=arguments.seconds, tick=bar.update)
            # Any exception: the other contests shall be measured all the same, and this one is reported.
            except Exception as failure:  # noqa: BLE001
                measured.failures.append(f"{contest}: {type(failure).__name__}: {failure}")
                continue
            measured.rows.extend(rows)
            measured.absent.extend(absent)
            if writer:
                writer.write(rows)
    return measured


def _show(rows: Sequence[Row], picture: Path | None) -> None:
    print("", report.table(rows), "", report.summary(rows), sep="\n")
    if warning := report.warning(rows):
        print(f"\n{warning}")
    if picture:
        plot.draw(rows, picture)
        print(f"\nDrawn: {picture}")
