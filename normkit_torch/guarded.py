# SPDX-License-Identifier: Apache-2.0
"""What is left to do in a call like one before, for any implementation: guard, addresses, memory of results, launch.

normkit/cpu/prepared.cpp does the same for the `cpu` implementation, in a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torch import Tensor

from normkit.call import Arrays
from normkit.cpu.prepared import Guarded
from normkit.spec import Problem

Bind = Callable[[tuple[int, ...]], Callable[[], None]]
"""Takes the addresses of what `Guarded.pointers` names, contiguous, 0 for what there is not; returns what runs the kernels."""

Results = tuple[Any, Tensor | None, Tensor | None, Tensor | None, Problem]
"""y, residual_out, mean and rstd, as in `normkit.interface.Forward`, or the gradients of x, residual, weight and bias; and the
call as it was described when it was prepared."""

Run = Callable[[Arrays], Results | None]
"""Computes a call; None if its tensors are not like those of the one that was prepared, or share memory that is written to."""

# what runs the kernel of a call that writes, by addresses that do not overlap, and what bound it to them; of all calls together
bound: dict[tuple[Any, ...], Callable[[], None]] = {}
_MOST_BOUND = 1024


def in_python(guarded: Guarded, bind: Bind) -> Run:
    """Return what computes calls like one before with the implementation that `bind` is of."""
    fits, make, pairs, written = guarded.fits, guarded.make, guarded.pairs, guarded.written
    problem, address_of, count_as_written = guarded.problem, guarded.address_of, guarded.count_as_written
    given_of, pointers_of, results_of = map(_picking, (guarded.places, guarded.pointers, guarded.results))
    written_of = _picking(written)
    absent = tuple(place not in guarded.places for place in range(6))

    def bound_to(addresses: tuple[Any, ...]) -> Callable[[], None] | None:
        pointers = pointers_of(addresses)
        for one, size, other, other_size in pairs:
            if pointers[one] < pointers[other] + other_size and pointers[other] < pointers[one] + size:
                return None
        if len(bound) >= _MOST_BOUND:
            bound.clear()
        launch = bound[addresses] = bind(pointers)
        return launch

    def run(tensors: Arrays) -> Results | None:
        x, residual, weight, bias, out, residual_out = tensors
        if (x is None, residual is None, weight is None, bias is None, out is None, residual_out is None) != absent:
            return None
        given = given_of(tensors)
        try:
            for tensor in given:  # a nested one has no strides, and to look for them the guard would end the process
                if tensor.is_nested is not False:
                    return None
        except AttributeError:  # it is no tensor
            return None
        if not fits(*given):
            return None
        arrays = (None, *given, *[new() for new in make]) if make else (None, *given)
        addresses = (0, *map(address_of, arrays[1:]), bind)
        launch = bound.get(addresses) or bound_to(addresses) if pairs else bind(pointers_of(addresses))
        if launch is None:
            return None
        launch()
        if written:
            count_as_written(written_of(tensors))
        return *results_of(arrays), problem

    return run


def _picking(places: tuple[int, ...]) -> Callable[[tuple[Any, ...]], Any]:
    return itemgetter(*places) if len(places) > 1 else lambda tensors: tuple(tensors[place] for place in places)
