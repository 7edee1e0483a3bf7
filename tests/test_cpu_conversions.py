# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: the conversions of every dtype at every level of instructions, and special values."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normkit import reference
from normkit.arrays import numpy_dtype
from normkit.cpu import library
from normkit.cpu import numpy as cpu
from normkit.spec import Problem

from .cpu_operands import COMPILED, DTYPES, KINDS, LOADED, Given, operands, problem_of

pytestmark = COMPILED


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_is_widened_exactly(dtype: str) -> None:
    assert isinstance(LOADED, library.Library)
    x = np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(64, 1024)
    given = (x, None, None, None)
    for level in LOADED.levels:
        residual_out = residual_out_at(level, problem_of("rms", given, "float32"), given)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(residual_out, x.astype(np.float32))
            np.testing.assert_array_equal(np.signbit(residual_out), np.signbit(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_float32_near_a_number_of_16_bits_is_rounded_to_nearest_even(dtype: str) -> None:
    """All numbers of 16 bits, the middle between each and the next, and the neighbours of both."""
    assert isinstance(LOADED, library.Library)
    narrow = np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype))
    with np.errstate(all="ignore"):
        wide = narrow.astype(np.float32)
        middle = ((wide.astype(np.float64) + np.roll(wide, -1).astype(np.float64)) / 2).astype(np.float32)
    bits = np.concatenate([array.view(np.uint32) + np.uint32(step) for array in (wide, middle) for step in (0, 1, 2**32 - 1)])
    x = np.concatenate([bits, np.random.default_rng(0).integers(0, 2**32, 65536, dtype=np.uint32)]).view(np.float32)
    x = x.reshape(-1, 1024)
    given = (x, None, None, None)
    with np.errstate(all="ignore"):
        expected = x.astype(numpy_dtype(dtype))
    for level in LOADED.levels:
        found = residual_out_at(level, problem_of("rms", given, dtype), given)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), ~number)
        np.testing.assert_array_equal(found.view(np.uint16)[number], expected.view(np.uint16)[number])


def test_every_sum_of_bfloat16_is_rounded_to_nearest_even() -> None:
    """x and residual of bfloat16 have a path of their own: every x with residuals of very different size."""
    assert isinstance(LOADED, library.Library)
    rng = np.random.default_rng(1)
    x = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(64, 1024)
    with np.errstate(all="ignore"):
        residuals = np.zeros_like(x), rng.permutation(x.ravel()).reshape(x.shape), x * ml_dtypes.bfloat16(0.0039)
    for residual in residuals:
        given = (x, residual, None, None)
        with np.errstate(all="ignore"):
            expected = (x.astype(np.float32) + residual.astype(np.float32)).astype(ml_dtypes.bfloat16)
        for level in LOADED.levels:
            found = residual_out_at(level, problem_of("rms", given), given)
            number = ~np.isnan(expected)
            np.testing.assert_array_equal(np.isnan(found), ~number)
            np.testing.assert_array_equal(found.view(np.uint16)[number], expected.view(np.uint16)[number])


def residual_out_at(level: int, problem: Problem, given: Given) -> Any:
    """residual_out, computed with the instructions of one level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "forward", partial(library.forward, level=level))
        return cpu.forward(problem, *given).residual_out


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 1e-40, 6e-8])
@pytest.mark.parametrize("place", [0, 37, 99])
def test_nan_infinity_and_subnormals_do_as_in_the_reference(kind: str, dtype: str, special: float, place: int) -> None:
    given = operands(3, 100, (dtype,) * 4)
    given[0][1, place] = special
    given[1][1, place] = special
    problem = problem_of(kind, given)
    with np.errstate(all="ignore"):
        expected, found = reference.forward(problem, *given), cpu.forward(problem, *given)
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2e-2, atol=2e-2)
