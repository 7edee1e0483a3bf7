# SPDX-License-Identifier: Apache-2.0
"""Prepared calls, compiled, with arrays that end where their memory ends in the place of PyTorch's tensors."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest

from normkit.arrays import numpy_dtype
from normkit.cpu import library, numpy, prepared
from normkit.interface import Guarded, Wanted
from normkit.spec import NormSpec, Operand, Problem, describe

DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"))
EACH = pytest.mark.parametrize("dtypes", DTYPES)
SHAPES = ((1, 1), (3, 33), (1500, 100))


class Like(np.ndarray[Any, Any]):
    """An array with what is asked of a tensor."""

    is_nested = False


def array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Like:
    return np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype)).view(Like)


def empty(shape: tuple[int, ...], dtype: str) -> Like:
    return np.empty(shape, numpy_dtype(dtype)).view(Like)


def problem_of(kind: str, shape: tuple[int, int], dtypes: tuple[str, str]) -> Problem:
    rows, affine = Operand(shape, dtypes[0]), Operand(shape[1:], dtypes[1])
    return describe(NormSpec(kind), rows, rows, affine, affine if kind == "layer" else None, needs_grad=True)


def run(problem: Problem, given: tuple[Any, ...], shapes: Any, dtypes: Any, pointers: int, wanted: Wanted | None) -> Any:
    """Compute by a prepared call whose results are all made, and refuse arrays that lack one, are not alike or not there."""
    places = tuple(place for place, each in enumerate(given) if each is not None)
    positions = [places.index(place) + 1 if place in places else 0 for place in range(6)]
    made = [None if dtype is None else partial(empty, shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    numbers = itertools.count(len(places) + 1)
    results = tuple(0 if make is None else next(numbers) for make in made)
    alike, lost = True, None
    guarded = Guarded(
        problem=problem,
        wanted=wanted,
        device=None,
        places=places,
        fits=lambda *arrays: alike,
        make=tuple(make for make in made if make is not None),
        results=results,
        pointers=(*positions[:pointers], *results),
        pairs=(),
        written=(),
        address_of=lambda each: 0 if each is lost else each.ctypes.data,
        count_as_written=lambda arrays: None,
    )
    call = prepared.compiled(guarded, library.threads())
    assert call is not None
    assert call((None,) * 6) is None
    alike = False
    assert call(given) is None
    alike = True
    for place in places:
        lost = given[place]
        assert call(given) is None
    lost = None
    found = call(given)
    assert found is not None
    *computed, described = found
    assert described is problem
    return computed


def assert_same_bits(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.tobytes() == other.tobytes()


@EACH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_both_passes(kind: str, shape: tuple[int, int], dtypes: tuple[str, str]) -> None:
    problem, (dtype, affine) = problem_of(kind, shape, dtypes), dtypes
    has_mean = kind == "layer"
    x, residual, weight = array(shape, dtype), array(shape, dtype, 1), array(shape[1:], affine, 2)
    bias = array(shape[1:], affine, 3) if has_mean else None
    statistics = "float32" if has_mean else None
    of_forward = [shape] * 2 + [shape[:1]] * 2, (dtype, dtype, statistics, "float32")
    found = run(problem, (x, residual, weight, bias, None, None), *of_forward, 4, None)
    expected = numpy.forward(problem, x, residual, weight, bias)
    assert_same_bits(found, expected)

    saved: Any = [None if each is None else np.array(each).view(Like) for each in expected]
    _, h, mean, rstd = saved
    dy, dresidual_out = array(shape, dtype, 4), array(shape, dtype, 5)
    of_backward = [shape] * 2 + [shape[1:]] * 2, (dtype, None, affine, affine if has_mean else None)
    wanted = Wanted(True, False, True, has_mean)
    found = run(problem, (dy, dresidual_out, h, weight, mean, rstd), *of_backward, 6, wanted)
    assert_same_bits(found, numpy.backward(problem, wanted, dy, dresidual_out, h, weight, mean, rstd))
