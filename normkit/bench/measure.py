# SPDX-License-Identifier: Apache-2.0
"""Timing: contestants in turn, in blocks of calls, because each framework has threads of its own, which have to wake.

The turn starts with another contestant in each round, and the first calls of a block are not counted: there the threads of the
last contestant may still wait awake. Nothing is collected as garbage meanwhile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Ready = Callable[[int], Callable[[], Any]]
"""The call of that index within a block, ready to be made: only the call itself is timed."""

Block = Callable[[int], list[float]]
"""Makes so many calls, and returns the seconds of each."""

ROUNDS = 20
_WARM_UP = 5
_LEAST, _MOST = 3, 5000
"""Calls of a block that are counted."""


class Times(NamedTuple):
    """Seconds of a call, 20th percentile, median and 80th percentile, and of how many calls."""

    p20: float
    median: float
    p80: float
    samples: int


def by_clock(ready: Ready, clock: Callable[[], float] = time.perf_counter) -> Block:
    """Time calls by a clock that returns seconds."""

    def block(count: int) -> list[float]:
        times = []
        for index in range(count):
            call = ready(index)
            start = clock()
            call()
            times.append(clock() - start)
        return times

    return block


def interleaved(
    contestants: Mapping[str, Block],
    seconds: float,
    *,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time contestants in turn.

    Args:
        contestants: by name.
        seconds: about how long the counted calls of each shall take together; slow ones take longer.
        tick: is called after each of ROUNDS rounds.

    Returns:
        The times of each one's call.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        counts = {name: _calls_of_a_block(block, seconds / ROUNDS) for name, block in contestants.items()}
        for start in range(ROUNDS):
            first = start % len(names)
            for name in names[first:] + names[:first]:
                dropped = -(-counts[name] // 4)
                found[name] += contestants[name](dropped + counts[name])[dropped:]
            tick()
    finally:
        if collecting:
            gc.enable()
    return {name: _summed_up(times) for name, times in found.items()}


def _summed_up(times: list[float]) -> Times:
    p20, median, p80 = np.percentile(times, (20, 50, 80))
    return Times(float(p20), float(median), float(p80), len(times))


def _calls_of_a_block(block: Block, seconds: float) -> int:
    fastest = min(block(_WARM_UP)[1:])
    return round(min(_MOST, max(_LEAST, seconds / max(fastest, 1e-9))))
