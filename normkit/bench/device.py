# SPDX-License-Identifier: Apache-2.0
"""Where contests run: who makes the arrays, how calls are timed there, and what belongs to its circumstances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import circumstances
from .contest import Arrays, Contest
from .measure import Block, Ready, by_clock

NAMES = ("cpu", "cuda")


def _room_enough(contest: Contest) -> None:
    pass


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: one of NAMES.
        cache_bytes: a contest that moves more works on two sets of buffers in turn, so that it finds nothing in the cache.
        arrays: the arrays of a contest for a seed, where contestants can take them.
        clocks: by their names, of CLOCKS, what times calls; the first is the usual one.
        facts: what belongs to the circumstances, by name of its column.
        check_room: raises an OptionError if a contest needs more memory than there is.
    """

    name: str
    cache_bytes: int
    arrays: Callable[[Contest, int], Arrays]
    clocks: Mapping[str, Callable[[Ready], Block]]
    facts: Mapping[str, str]
    check_room: Callable[[Contest], None] = _room_enough


def processor() -> Device:
    """Return the processor, with arrays of NumPy."""
    return Device("cpu", circumstances.cache_bytes(), Contest.arrays, {"host": by_clock}, {})
