# SPDX-License-Identifier: Apache-2.0
"""What is left to do in a call of PyTorch like one before, as data; and the compiled function that does it, prepared.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Any

from ..arrays import Array
from ..spec import Problem
from . import library

# the fields of the struct in prepared.cpp
_MOST_POINTERS, _MOST_PAIRS = 10, 9
_LAYOUT = Struct(f"=2q 4q {_MOST_POINTERS}q 2q q {4 * _MOST_PAIRS}q").pack


@dataclass(frozen=True, slots=True)
class Guarded:
    """What is known of a call. Its arrays are x, residual, weight, bias, out and residual_out, some of which are given.

    Those of a backward pass are dy, dresidual_out, h, weight, mean and rstd, and its results the gradients of x, residual,
    weight and bias.

    Attributes:
        problem: the call, as it was described when it was prepared.
        places: which of the arrays, from 0, are given.
        fits: whether these are like those of the call that was prepared.
        make: what makes the results that are not given.
        results: which of the arrays given, then made, counted from 1, are y, residual_out, mean and rstd; 0 for none.
        pointers: which of them are x, residual, weight, bias, y, residual_out, mean and rstd; of a backward pass its arrays,
            dx, dresidual, dweight and dbias.
        pairs: for each two of these that must not share memory: which one, its bytes, which other, its bytes.
        written: places, from 0, of the arrays given that are written to and have to be counted as that.
        address_of: returns the address of an array.
        count_as_written: takes such arrays.
    """

    problem: Problem
    places: tuple[int, ...]
    fits: Callable[..., bool]
    make: tuple[Callable[[], Array], ...]
    results: tuple[int, ...]
    pointers: tuple[int, ...]
    pairs: tuple[tuple[int, int, int, int], ...]
    written: tuple[int, ...]
    address_of: Callable[[Array], int]
    count_as_written: Callable[[tuple[Array, ...]], object]


def compiled(
    guarded: Guarded, threads: int, openmp: tuple[int, int] = library.OWN_THREADS, is_backward: bool = False
) -> Callable[[tuple[Array | None, ...]], Any] | None:
    """Return what runs the kernels on contiguous arrays; None where that is not there.

    The function takes all six arrays, None for those that are not given, and returns the four results with the problem; or None
    if the arrays are not like those of the call that was prepared, or share memory that is written to.

    Args:
        guarded: what is known.
        threads: the most to use.
        openmp: as in `normkit.cpu.library.packed_forward`.
        is_backward: whether it is a backward pass.
    """
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
    return prepare(layout, packed, *objects)


def _bits(places: Iterable[int]) -> int:
    return sum(1 << place for place in places)
