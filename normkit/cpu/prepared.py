# SPDX-License-Identifier: Apache-2.0
"""What is left to do in a call of PyTorch like one before, by a compiled function: prepared.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from ..interface import Guarded, Run
from . import library

# the fields of the struct in prepared.cpp
_MOST_POINTERS, _MOST_PAIRS = 10, 9
_LAYOUT = Struct(f"=2q 4q {_MOST_POINTERS}q 2q q {4 * _MOST_PAIRS}q").pack


def compiled(guarded: Guarded, threads: int, openmp: tuple[int, int] = library.OWN_THREADS) -> Run | None:
    """Return what computes calls like one before; None where functions of CPython that it needs are not there.

    Args:
        guarded: what is known.
        threads: the most to use.
        openmp: as in `normkit.cpu.library.packed_forward`.
    """
    is_backward = guarded.wanted is not None
    prepare = library.loaded().prepare
    if prepare is None:
        return None
    layout = _LAYOUT(
        *(is_backward, _bits(guarded.places), *guarded.results, *guarded.pointers),
        *(0,) * (_MOST_POINTERS - len(guarded.pointers)),
        *(_bits(guarded.written), not library.is_quick(guarded.problem), len(guarded.pairs)),
        *(number for pair in guarded.pairs for number in pair),
        *(0,) * (4 * (_MOST_PAIRS - len(guarded.pairs))),
    )
    packed = library.packed_without_pointers(guarded.problem, threads, openmp, is_backward)
    objects = guarded.fits, guarded.address_of, guarded.count_as_written, guarded.make, guarded.problem
    run: Run = prepare(layout, packed, *objects)
    return run


def _bits(places: Iterable[int]) -> int:
    return sum(1 << place for place in places)
