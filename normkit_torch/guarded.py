# SPDX-License-Identifier: Apache-2.0
"""What is left to do in a call like one before, for any implementation: guard, addresses, memory of results, launch.

normkit/cpu/prepared.cpp does the same for the `cpu` implementation, in a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from normkit.call import Arrays
from normkit.cpu.prepared import Guarded
from normkit.spec import Problem
from normkit.vendors.exchange import Compute, Given
from normkit.vendors.exchange import Results as Vendor

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
    make, pairs, written, problem = guarded.make, guarded.pairs, guarded.written, guarded.problem
    address_of, count_as_written = guarded.address_of, guarded.count_as_written
    pointers_of, results_of, written_of = map(_picking, (guarded.pointers, guarded.results, written))
    given_like_then, overlap = _guard(guarded), _overlap(guarded)

    def bound_to(addresses: tuple[Any, ...]) -> Callable[[], None] | None:
        pointers = pointers_of(addresses)
        if overlap(pointers):
            return None
        if len(bound) >= _MOST_BOUND:
            bound.clear()
        launch = bound[addresses] = bind(pointers)
        return launch

    def run(tensors: Arrays) -> Results | None:
        given = given_like_then(tensors)
        if given is None:
            return None
        arrays = (None, *given, *[new() for new in make]) if make else (None, *given)
        addresses = (0, *map(address_of, arrays[1:]), bind)
        if 0 in addresses[1:]:  # to the kernels, address 0 is an array that there is not
            return None
        launch = (bound.get(addresses) or bound_to(addresses)) if pairs else bind(pointers_of(addresses))
        if launch is None:
            return None
        launch()
        if written:
            count_as_written(written_of(tensors))
        return *results_of(arrays), problem

    return run


def on_tensors(guarded: Guarded, compute: Compute) -> Run:
    """Return what computes calls like one before with a vendor's operators, which take tensors and make their own results."""
    problem, pairs, written = guarded.problem, guarded.pairs, guarded.written
    address_of, count_as_written = guarded.address_of, guarded.count_as_written
    written_of = _picking(written)
    given_like_then, overlap = _guard(guarded), _overlap(guarded)
    spec, shape, in_place = problem.spec, problem.shape, problem.in_place
    flat = None if len(shape) == 2 else (problem.rows, problem.hidden_size)

    def run(tensors: Arrays) -> Results | None:
        if given_like_then(tensors) is None:
            return None
        x, residual, weight, bias, _, _ = tensors
        addresses = [None if tensor is None else address_of(tensor) for tensor in tensors[:4]]
        if 0 in addresses or (pairs and overlap(addresses)):
            return None
        rows = (x, residual) if flat is None else (x.view(flat), residual if residual is None else residual.view(flat))
        results = compute(spec, Given(*rows, weight, bias), Vendor(*rows) if in_place else None)
        if written:
            count_as_written(written_of(tensors))
        if in_place:
            return x, residual, None, None, problem
        y, residual_out = results
        if flat is not None:
            y, residual_out = y.view(shape), residual_out if residual_out is None else residual_out.view(shape)
        return y, residual_out, None, None, problem

    return run


def _guard(guarded: Guarded) -> Callable[[Arrays], tuple[Tensor, ...] | None]:
    """Return what picks the tensors given, None if they are not like those of the call that was prepared."""
    fits, given_of = guarded.fits, _picking(guarded.places)
    absent = tuple(place not in guarded.places for place in range(6))

    def given_like_then(tensors: Arrays) -> tuple[Tensor, ...] | None:
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
        return given if fits(*given) else None

    return given_like_then


def _overlap(guarded: Guarded) -> Callable[[Sequence[int]], bool]:
    """Return what says whether memory that is written to is that of another tensor, by the pointers that `Guarded` names."""
    pairs = guarded.pairs

    def overlap(pointers: Sequence[int]) -> bool:
        for one, size, other, other_size in pairs:
            if pointers[one] < pointers[other] + other_size and pointers[other] < pointers[one] + size:
                return True
        return False

    return overlap


def _picking(places: tuple[int, ...]) -> Callable[[tuple[Any, ...]], Any]:
    return itemgetter(*places) if len(places) > 1 else lambda tensors: tuple(tensors[place] for place in places)
