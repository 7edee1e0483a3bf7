# SPDX-License-Identifier: Apache-2.0
"""What is left to do in a call like one before, for any implementation: guard, addresses, memory of results, launch.

normkit/cpu/prepared.cpp does the same for the `cpu` implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from .interface import Guarded, Run

Start = Callable[[tuple[int, ...]], object]
"""Launches kernels on contiguous arrays, by the addresses of what `Guarded.pointers` names, 0 for what there is not."""

Given = tuple[tuple[Any, ...], tuple[int, ...]]
"""The arrays of a call that are given, and their addresses."""


def in_python(guarded: Guarded, start: Start) -> Run:
    """Return what computes calls like one before with the kernels that `start` launches."""
    make, written, problem, address_of = guarded.make, guarded.written, guarded.problem, guarded.address_of
    pointers_of, results_of, written_of = map(picking, (guarded.pointers, guarded.results, written))
    like_then, count_as_written = guard(guarded), guarded.count_as_written

    def run(arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
        found = like_then(arrays)
        if found is None:
            return None
        given, addresses = found
        made = [new() for new in make] if make else ()
        start(pointers_of((0, *addresses, *map(address_of, made))))
        if written:
            count_as_written(written_of(arrays))
        return *results_of((None, *given, *made)), problem

    return run


def guard(guarded: Guarded) -> Callable[[tuple[Any, ...]], Given | None]:
    """Return what picks the arrays given, None for those that `normkit.interface.Run` does not compute."""
    fits, given_of, address_of = guarded.fits, picking(guarded.places), guarded.address_of
    absent = tuple(place not in guarded.places for place in range(6))
    # two arrays are apart if their distance is not between these
    pairs = [(one - 1, -size, other - 1, other_size) for one, size, other, other_size in guarded.pairs]

    def like_then(arrays: tuple[Any, ...]) -> Given | None:
        x, residual, weight, bias, out, residual_out = arrays
        if (x is None, residual is None, weight is None, bias is None, out is None, residual_out is None) != absent:
            return None
        given = given_of(arrays)
        try:
            for array in given:  # a nested tensor has no strides, and to look for them the guard would end the process
                if array.is_nested is not False:
                    return None
        except AttributeError:  # it is no tensor
            return None
        if not fits(*given):
            return None
        addresses = (*map(address_of, given),)
        if 0 in addresses:  # memory that was freed; to kernels, address 0 is an array that there is not
            return None
        for one, low, other, high in pairs:
            if low < addresses[one] - addresses[other] < high:
                return None
        return given, addresses

    return like_then


def picking(places: tuple[int, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what picks what is at these places."""
    return itemgetter(*places) if len(places) > 1 else lambda arrays: tuple(arrays[place] for place in places)
