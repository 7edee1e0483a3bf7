# SPDX-License-Identifier: Apache-2.0
"""What is known of a call of tensors, for an implementation to compute others like it.

The guard is the one that torch.compile has for its own. It sees in one look whether tensors are like those of then in type,
device, dtype, shape, strides, and in all that torch would treat them by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._C import _increment_version
from torch._C._dynamo.guards import TensorGuards
from torch.nn import Parameter

from normkit.call import Arrays
from normkit.interface import Gradients, Guarded, Wanted
from normkit.spec import Problem

from . import allocate

Results = tuple[Any, Tensor | None, Tensor | None, Tensor | None, Problem]
"""What `normkit.interface.Run` returns: y, residual_out, mean and rstd or four gradients, and the problem of then."""


def of_forward(problem: Problem, tensors: Arrays) -> Guarded | None:
    """Return what is known of a forward pass; None if no other can be told to be like it."""
    places, given = _places(tensors)
    if not _can_be_guarded(problem, given):
        return None
    positions = _positions(places)
    writes = (0, 1) if problem.in_place else (4, 5)
    written = [place for place in writes if place in places]
    statistics = problem.compute_dtype if problem.needs_grad else None
    dtypes = [problem.out_dtype, problem.residual_out_dtype, statistics if problem.spec.subtract_mean else None, statistics]
    shapes = [problem.shape] * 2 + [problem.shape[:-1]] * 2
    given_at = [*(positions[place] for place in writes), 0, 0]
    results, make = _results(given_at, shapes, dtypes, len(given), tensors[0].device)
    return Guarded(
        problem=problem,
        wanted=None,
        device=tensors[0].device,
        places=tuple(places),
        fits=_guard(given),
        make=make,
        results=results,
        pointers=(*positions[:4], *results),
        pairs=_pairs(positions, [0 if tensor is None else tensor.nbytes for tensor in tensors], written),
        written=tuple(place for place in written if not tensors[place].is_inference()),
        address_of=Tensor.data_ptr,
        count_as_written=_increment_version,
    )


def of_backward(problem: Problem, wanted: Wanted, tensors: Arrays) -> Guarded | None:
    """Return what is known of a backward pass, as `of_forward` does; the tensors are dy, dresidual_out, h and what follows."""
    places, given = _places(tensors)
    if not _can_be_guarded(problem, given):
        return None
    device, hidden = tensors[0].device, problem.shape[-1:]
    of_operands = problem.x_dtype, problem.residual_dtype, problem.weight_dtype, problem.bias_dtype
    dtypes = [dtype if asked else None for dtype, asked in zip(of_operands, wanted, strict=True)]
    gradients, make = _results([0] * 4, [problem.shape] * 2 + [hidden] * 2, dtypes, len(given), device)
    made = Gradients(*gradients)
    return Guarded(
        problem=problem,
        wanted=wanted,
        device=device,
        places=tuple(places),
        fits=_guard(given),
        make=make,
        results=tuple(position or 0 for position in (made if wanted.dresidual else made.by_operand(problem))),
        pointers=(*_positions(places), *gradients),
        pairs=(),
        written=(),
        address_of=Tensor.data_ptr,
        count_as_written=_increment_version,
    )


def _places(tensors: Arrays) -> tuple[list[int], list[Tensor]]:
    places = [place for place, tensor in enumerate(tensors) if tensor is not None]
    return places, [tensors[place] for place in places]


def _can_be_guarded(problem: Problem, given: list[Tensor]) -> bool:
    # a guard takes one tensor in two places for another call
    return problem.rows > 0 and all(map(_is_plain, given)) and len(set(map(id, given))) == len(given)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.is_contiguous() and not tensor.is_neg()


def _positions(places: list[int]) -> list[int]:
    """Return for each of six tensors where it is among those given, from 1; 0 where it is not."""
    return [places.index(place) + 1 if place in places else 0 for place in range(6)]


def _guard(given: list[Tensor]) -> Callable[..., bool]:
    layouts: dict[str, Any] = {
        "dynamic_dims_sizes": [[*tensor.shape] for tensor in given],
        "dynamic_dims_strides": [[*tensor.stride()] for tensor in given],
    }
    return TensorGuards(*given, **layouts).check


def _results(
    given_at: list[int], shapes: list[tuple[int, ...]], dtypes: list[str | None], given: int, device: torch.device
) -> tuple[tuple[int, ...], tuple[Callable[[], Tensor], ...]]:
    """Return where four results are, as in `Guarded`, and what makes those that are not given and have a dtype."""
    results: list[int] = []
    make: list[Callable[[], Tensor]] = []
    for position, shape, dtype in zip(given_at, shapes, dtypes, strict=True):
        if position or dtype is None:
            results.append(position)
        else:
            make.append(allocate.maker(shape, getattr(torch, dtype), device))
            results.append(given + len(make))
    return tuple(results), tuple(make)


def _pairs(positions: list[int], sizes: list[int], written: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the pairs of tensors of which one is written to."""
    read = [place for place in range(4) if sizes[place] and place not in written]
    pairs = [*pairwise(written), *((one, other) for one in written for other in read)]
    return tuple((positions[one], sizes[one], positions[other], sizes[other]) for one, other in pairs)
