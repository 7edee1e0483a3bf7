# SPDX-License-Identifier: Apache-2.0
"""Arrays and problems for tests of the CPU kernels through NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normkit.arrays import numpy_dtype
from normkit.cpu import library
from normkit.spec import NormSpec, Operand, Problem, describe

LOADED = library.load()
COMPILED = pytest.mark.skipif(isinstance(LOADED, library.Missing), reason="the CPU kernels are not compiled")
DTYPES = ("float32", "bfloat16", "float16")
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
Given = tuple[Any, Any, Any, Any]


def operands(rows: int, hidden: int, dtypes: tuple[str | None, ...], seed: int = 0) -> Given:
    """Random x, residual, weight and bias."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, hidden), (rows, hidden), (hidden,), (hidden,))
    x, residual, weight, bias = (
        None if dtype is None else rng.standard_normal(shape).astype(numpy_dtype(dtype))
        for shape, dtype in zip(shapes, dtypes, strict=False)
    )
    return x, residual, weight, bias


def problem_of(
    kind: str, given: Given, residual_dtype: str | None = None, rounding: str | None = None, **facts: Any
) -> Problem:
    """Describe a call of NumPy arrays."""
    x, residual, weight, bias = (None if array is None else Operand(array.shape, array.dtype.name) for array in given)
    assert x is not None
    return describe(NormSpec(kind, 1e-6, 0.0, rounding), x, residual, weight, bias, residual_dtype=residual_dtype, **facts)


def assert_same_bits(found: Any, expected: Any) -> None:
    """Compare results one by one."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), index
        if one is not None:
            kind = f"u{one.itemsize}"
            np.testing.assert_array_equal(np.asarray(one).view(kind), np.asarray(other).view(kind), err_msg=str(index))
