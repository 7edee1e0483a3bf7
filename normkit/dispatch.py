# SPDX-License-Identifier: Apache-2.0
"""From NumPy arrays to an implementation and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import registry
from .arrays import Array, framework_of, not_an_array, numpy_dtype
from .call import Call
from .errors import DtypeError, OptionError
from .implementations import TABLE
from .interface import Forward, Kernels
from .memory import check_written
from .spec import Operand, Problem


def as_numpy(call: Call) -> Call:
    """Return the call with arrays that speak DLPack made NumPy's."""
    return call.with_arrays(_from_dlpack)


def _from_dlpack(name: str, array: Array) -> np.ndarray[Any, Any]:
    if isinstance(array, np.ndarray):
        return array
    framework = framework_of(array)
    if framework or not hasattr(array, "__dlpack__"):
        kind = "an array of NumPy, PyTorch or JAX" if name == "x" else "a NumPy array like x"
        raise not_an_array(name, array, f"{kind}, or speak DLPack")
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise DtypeError(f"{name} speaks DLPack, but NumPy cannot take it: {error}; make it a torch or JAX array") from error


def operand(name: str, array: Array) -> Operand:
    """Describe an array.

    Raises:
        DtypeError: it is not NumPy's, or one that is more than its elements, as a masked array or a matrix is.
    """
    if type(array) is not np.ndarray:
        if not isinstance(array, np.ndarray):
            raise not_an_array(name, array, "a NumPy array like x")
        if isinstance(array, np.ma.MaskedArray | np.matrix):
            raise not_an_array(name, array, "a plain NumPy array, as numpy.asarray or, of a masked array, filled() gives it")
    return Operand(array.shape, array.dtype.name)


def problem_of(call: Call) -> Problem:
    """Validate a call and describe it."""
    return call.problem(operand)


def forward(call: Call) -> Forward:
    """Choose an implementation and compute; the results are contiguous."""
    problem = problem_of(call)
    return _forward(call, problem, registry.select(problem, TABLE, call.implementation).load())


def _forward(call: Call, problem: Problem, kernels: Kernels) -> Forward:
    with np.errstate(all="ignore"):  # infinities and NaN propagate in silence, as in the other frameworks
        y, residual_out, mean, rstd = kernels.forward(problem, call.x, call.residual, call.weight, call.bias)
    residual_out = None if residual_out is None else np.ascontiguousarray(residual_out)
    return Forward(np.ascontiguousarray(y), residual_out, mean, rstd)


def forward_into(call: Call) -> Forward:
    """Choose an implementation and compute into the arrays given; what it cannot write there is copied."""
    problem = problem_of(call)
    _check_outputs(call)
    kernels = registry.select(problem, TABLE, call.implementation).load()
    if not hasattr(kernels, "forward_into"):
        return call.written(_forward(call, problem, kernels))
    out = call.room(problem, lambda dtype: np.empty(problem.shape, numpy_dtype(dtype)))
    with np.errstate(all="ignore"):
        kernels.forward_into(problem, call.x, call.residual, call.weight, call.bias, out)
        return call.written(out)


def _check_outputs(call: Call) -> None:
    for name, array in call.outputs.items():
        if not array.flags.writeable:
            raise OptionError(f"{name} is written to, and this array is read-only; give one that is not")
    check_written(call.outputs, call.arrays, "", "give another array")
