# SPDX-License-Identifier: Apache-2.0
"""One contest: every contestant is verified, then all are timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..tolerance import Expectation
from .contest import Arrays, Contest, Program
from .contestants import COPY, Contestant
from .device import Device
from .measure import Block, Ready, Times, interleaved
from .verify import WrongResultError, expectations, sparse, spoil, worst_error

_RESET_AFTER = 256
"""Calls after which what was overwritten is given its values again: the residual grows with each call, and may not overflow."""


@dataclass(frozen=True)
class Row:
    """How one contestant fared in one contest; a line of the table.

    Attributes:
        case: rows x hidden_size.
        rows: of x.
        hidden_size: of x.
        dtype: of all arrays.
        kind: "rms" or "layer".
        pass_: one of PASSES.
        contestant: its name.
        framework: whose arrays it takes.
        implementation: the one that normkit chose; "" for others.
        us_p20: 20th percentile of the microseconds of a call.
        us_median: their median.
        us_p80: their 80th percentile.
        samples: how many calls were timed.
        gb_per_s: bytes of the byte model, in 1e9, per second; None where only the launch was timed.
        percent_of_copy: of the bandwidth of the copy in the same contest; None where only the launch was timed.
        ratio_to_normkit: how many times as long it takes as normkit for the same framework; None without one.
        worst_error: the largest error in units of its bound; None for the copy.
        clock: one of CLOCKS.
    """

    case: str
    rows: int
    hidden_size: int
    dtype: str
    kind: str
    pass_: str
    contestant: str
    framework: str
    implementation: str
    us_p20: float
    us_median: float
    us_p80: float
    samples: int
    gb_per_s: float | None
    percent_of_copy: float | None
    ratio_to_normkit: float | None
    worst_error: float | None
    clock: str = "host"

    @property
    def within_bounds(self) -> str:
        """ "yes", "no", or "" for the copy."""
        return "" if self.worst_error is None else "yes" if self.worst_error <= 1 else "no"


class Absent(NamedTuple):
    """A contestant that does not take part in a contest, and why."""

    contestant: str
    contest: Contest
    reason: str


class Outcome(NamedTuple):
    """What became of a contest."""

    rows: list[Row]
    absent: list[Absent]


class _Entry(NamedTuple):
    contestant: Contestant
    block: Block
    implementation: str
    error: float | None


def compete(
    contest: Contest,
    contestants: Sequence[Contestant],
    device: Device,
    *,
    seconds: float,
    tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Verify and time contestants.

    Args:
        contest: what they compute.
        contestants: the copy among them.
        device: where.
        seconds: see `normkit.bench.measure.interleaved`.
        tick: is called after each round.

    Raises:
        WrongResultError: a contestant that is normkit is not within its bounds.
    """
    device.check_room(contest)
    sets = [device.arrays(contest, seed) for seed in range(2 if contest.moved_bytes > device.cache_bytes else 1)]
    shared: dict[Any, list[Any]] = {}
    clock = device.clocks[contest.clock]

    def timed(program: Program) -> Block:
        return clock(_ready(program, sets, shared))

    given = sparse(contest, sets[0])
    expected = expectations(contest, given)
    entries, absent = [], []
    for contestant in contestants:
        entry = _enter(contestant, contest, given, expected, timed)
        if isinstance(entry, str):
            absent.append(Absent(contestant.name, contest, entry))
        else:
            entries.append(entry)
    del given
    times = interleaved({entry.contestant.name: entry.block for entry in entries}, seconds, tick=tick)
    computed = device.name == "cpu" or contest.clock != "host"
    return Outcome([_row(contest, entry, entries, times, computed) for entry in entries], absent)


def _enter(
    contestant: Contestant,
    contest: Contest,
    given: Arrays,
    expected: dict[str, Expectation],
    timed: Callable[[Program], Block],
) -> _Entry | str:
    """Verify a contestant and make its calls ready to be timed, or return why it does not take part."""
    reason = contestant.refusal(contest)
    if reason is not None:
        return reason
    try:
        program = contestant.program(contest)
        if program.results is None:
            return _Entry(contestant, timed(program), "", None)
        buffers = program.put(given)
        results = program.results(buffers, program.ready(buffers)())
        # asked for now, because kernels that could not be launched are another one's from then on
        implementation = program.implementation(buffers)
        error = worst_error(contest, expected, results)
        spoil(results.values())
        del buffers, results  # which are large
        block = timed(program)
    # Any exception: what others' packages fail with cannot be foreseen, and why is reported.
    except Exception as failure:
        if contestant.ours:
            raise
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    if contestant.ours and not error <= 1:
        raise WrongResultError(f"{contestant.name} ({implementation}) is wrong on {contest}: {error:.3g} times the bound")
    return _Entry(contestant, block, implementation, error)


def _ready(program: Program, sets: list[Arrays], shared: dict[Any, list[Any]]) -> Ready:
    if program.put not in shared:
        shared[program.put] = [program.put(arrays) for arrays in sets]
    buffers = shared[program.put]

    def ready(index: int) -> Callable[[], Any]:
        if index % _RESET_AFTER == 0:
            for each, arrays in zip(buffers, sets, strict=True):
                program.reset(each, arrays)
        return program.ready(buffers[index % len(buffers)])

    return ready


def _row(contest: Contest, entry: _Entry, entries: Sequence[_Entry], times: dict[str, Times], computed: bool) -> Row:
    """Return a row; `computed` is whether the times are those of computing, and not of launching alone."""
    name, framework = entry.contestant.name, entry.contestant.framework
    own = times[name]
    ours = [times[each.contestant.name] for each in entries if each.contestant.ours and each.contestant.framework == framework]
    return Row(
        case=str(contest.case),
        rows=contest.case.rows,
        hidden_size=contest.case.hidden_size,
        dtype=contest.dtype,
        kind=contest.kind,
        pass_=contest.pass_,
        contestant=name,
        framework=framework,
        implementation=entry.implementation,
        us_p20=_rounded(1e6 * own.p20),
        us_median=_rounded(1e6 * own.median),
        us_p80=_rounded(1e6 * own.p80),
        samples=own.samples,
        gb_per_s=_rounded(contest.moved_bytes / own.median / 1e9) if computed else None,
        percent_of_copy=_rounded(100 * times[COPY].median / own.median) if computed else None,
        ratio_to_normkit=_rounded(own.median / ours[0].median) if ours else None,
        worst_error=None if entry.error is None else _rounded(entry.error),
        clock=contest.clock,
    )


def _rounded(value: float) -> float:
    """Return the six digits that the CSV file has, so that what is shown of it is what is shown now."""
    return float(f"{value:.6g}")
