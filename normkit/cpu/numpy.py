# SPDX-License-Identifier: Apache-2.0
"""The `cpu` implementation for NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import numpy_dtype
from ..interface import Forward, Gradients, Wanted
from ..layout import row_layout
from ..spec import Problem
from . import library
from .library import supports, threads

__all__ = ["backward", "forward", "forward_into", "supports"]

NumpyArray = np.ndarray[Any, Any]


def forward(
    problem: Problem, x: NumpyArray, residual: NumpyArray | None, weight: NumpyArray | None, bias: NumpyArray | None
) -> Forward:
    """Compute y, residual_out and, if a backward may follow, the statistics."""
    statistics = "float32" if problem.needs_grad else None
    out = Forward(
        np.empty(problem.shape, numpy_dtype(problem.out_dtype)),
        _new(problem.shape, problem.residual_out_dtype),
        _new(problem.shape[:-1], statistics if problem.spec.subtract_mean else None),
        _new(problem.shape[:-1], statistics),
    )
    forward_into(problem, x, residual, weight, bias, out)
    return out


def forward_into(
    problem: Problem,
    x: NumpyArray,
    residual: NumpyArray | None,
    weight: NumpyArray | None,
    bias: NumpyArray | None,
    out: Forward,
) -> None:
    """Write the results into the arrays of `out`, of any strides; y may be x itself, and residual_out the residual."""
    (x, residual, y, residual_out), inner_rows, rows = _laid_out(problem, x, residual, out.y, out.residual_out)
    # kept here, so that a copy lives as long as the call
    given = (x, residual, _plain(weight), _plain(bias), y, residual_out, out.mean, out.rstd)
    pointers = tuple(0 if array is None else array.ctypes.data for array in given)
    library.forward(problem, pointers, rows, inner_rows, threads())
    if y is not out.y:
        out.y[...] = y
    if out.residual_out is not None and out.residual_out is not residual_out:
        out.residual_out[...] = residual_out


def backward(
    problem: Problem,
    wanted: Wanted,
    dy: NumpyArray,
    dresidual_out: NumpyArray | None,
    h: NumpyArray,
    weight: NumpyArray | None,
    mean: NumpyArray | None,
    rstd: NumpyArray | None,
) -> Gradients:
    """Compute the gradients, dweight and dbias by partial sums over a fixed division of the rows."""
    hidden = problem.shape[-1:]
    gradients = Gradients(
        _new(problem.shape, problem.x_dtype if wanted.dx else None),
        _new(problem.shape, problem.residual_dtype if wanted.dresidual else None),
        _new(hidden, problem.weight_dtype if wanted.dweight else None),
        _new(hidden, problem.bias_dtype if wanted.dbias else None),
    )
    rows_given, inner_rows, rows = _laid_out(problem, dy, dresidual_out, h)
    given = (*rows_given, _plain(weight), _plain(mean), _plain(rstd))
    pointers = tuple(0 if one is None else one.ctypes.data for one in given + gradients)
    library.backward(problem, pointers, rows, inner_rows, threads())
    return gradients


def _new(shape: tuple[int, ...], dtype: str | None) -> NumpyArray | None:
    return None if dtype is None else np.empty(shape, numpy_dtype(dtype))


def _plain(array: NumpyArray | None) -> NumpyArray | None:
    """Return the array contiguous and in the processor's byte order: itself or a copy."""
    return None if array is None else np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _laid_out(problem: Problem, *arrays: NumpyArray | None) -> tuple[tuple[Any, ...], int, tuple[int, ...]]:
    """Return the arrays, those copied whose rows two loops do not reach, inner_rows, and the strides of each one's rows."""
    hidden = problem.shape[-1]
    if all(array is None or (array.flags.c_contiguous and array.dtype.isnative) for array in arrays):
        return arrays, 1, (hidden, 0) * len(arrays)
    there = [array if _has_whole_strides(array) else _plain(array) for array in arrays if array is not None]
    layout = row_layout(
        problem.shape, [[step // array.itemsize for step in array.strides] for array in there if array is not None]
    )
    found = iter(zip(there, layout.strides, strict=True))
    rows: tuple[int, ...] = ()
    reached: list[NumpyArray | None] = []
    for given in arrays:
        array, own = (None, None) if given is None else next(found)
        reached.append(_plain(array) if own is None else array)
        rows += own or (layout.inner_rows * hidden, hidden)
    return tuple(reached), layout.inner_rows, rows


def _has_whole_strides(array: NumpyArray) -> bool:
    return array.dtype.isnative and all(step % array.itemsize == 0 for step in array.strides)
