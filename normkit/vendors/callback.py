# SPDX-License-Identifier: Apache-2.0
"""Vendors' operators within a program that JAX compiles: a callback into this process, on the program's own buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from threading import Lock
from typing import Any

import numpy as np

from ..arrays import Array, numpy_dtype
from ..interface import Forward
from ..spec import Problem
from . import custom_call
from .exchange import Compute, Given, Results
from .guards import DEVICES

# of two functions for one call, the cache would keep one, and the address of the other would dangle
_making = Lock()


def forward(compute: Compute, problem: Problem, arrays: tuple[Array | None, ...], overwrites: bool) -> Forward:
    """Make the operators a part of the program that JAX is lowering.

    Args:
        compute: runs the operators.
        problem: the call.
        arrays: x, residual, weight and bias.
        overwrites: whether y is to be where x is, and residual_out where residual is; XLA copies these first, unless they were
            donated or are not needed any more.
    """
    import jax

    x, residual, *parameters = arrays
    rows = [array for array in (x, residual) if array is not None]
    if problem.rows:
        present = tuple(array is not None for array in arrays)
        shapes = [jax.ShapeDtypeStruct(problem.shape, numpy_dtype(problem.x_dtype)) for _ in rows]
        aliases = {0: 0, 1: 1} if overwrites and residual is not None else {}
        call = _call(compute, problem, present, shapes, aliases)
        rows = call(*rows, *(array for array in parameters if array is not None))
    return Forward(rows[0], None if residual is None else rows[1], None, None)


def _call(
    compute: Compute, problem: Problem, present: tuple[bool, ...], shapes: Sequence[Any], aliases: dict[int, int]
) -> Callable[..., Any]:
    """Return what puts the operators into the program."""
    import jax

    target = custom_call.target() if problem.platform == "cpu" else None
    if target is None:
        from jax.experimental.buffer_callback import buffer_callback

        return buffer_callback(_callback(compute, problem, present), shapes, input_output_aliases=aliases)
    with _making:
        address = ctypes.cast(_function(compute, problem, present), ctypes.c_void_p).value
    call = jax.ffi.ffi_call(target, shapes, input_output_aliases=aliases)

    def with_address(*operands: Any) -> Any:
        return call(*operands, function=np.array([address], np.int64))

    return with_address


# For ever, as long as which a program may last.
@cache
def _function(compute: Compute, problem: Problem, present: tuple[bool, ...]) -> Any:
    """Return what the program's custom call calls."""
    rows = [custom_call.Buffer(problem.x_dtype, (problem.rows, problem.hidden_size))] * sum(present[:2])
    dtypes = [dtype for dtype in (problem.weight_dtype, problem.bias_dtype) if dtype]
    parameters = [custom_call.Buffer(dtype, problem.shape[-1:]) for dtype in dtypes]
    return custom_call.function(partial(compute, problem.spec), partial(_arguments, present), [*rows, *parameters, *rows])


def _arguments(present: Sequence[bool], *tensors: Any) -> tuple[Given, Results]:
    """Return the arguments of what runs the operators, of the tensors that there are: the operands and then the results."""
    rest = iter(tensors)
    given = Given(*(next(rest) if there else None for there in present))
    return given, Results(next(rest), next(rest, None))


def _callback(compute: Compute, problem: Problem, present: Sequence[bool]) -> Callable[..., None]:
    """Return what `buffer_callback` calls, with the program's buffers for the results, and those of the operands."""
    from torch.utils.dlpack import from_dlpack

    def from_capsule(buffer: Any) -> Any:
        return from_dlpack(buffer.__dlpack__())

    kind, flat = DEVICES[problem.platform], (problem.rows, problem.hidden_size)
    # torch asks a buffer for its device, and a capsule for nothing; on a GPU it also has to say in which stream it works
    tensor = from_capsule if kind == "cpu" else from_dlpack

    def run(context: Any, results: Any, *buffers: Any) -> None:
        with nullcontext() if kind == "cpu" else _stream(kind, context, results[0]):
            tensors = [tensor(buffer) for buffer in (*buffers, *results)]
            for index in (*range(len(results)), *range(len(buffers), len(tensors))):
                tensors[index] = tensors[index].view(flat)
            compute(problem.spec, *_arguments(present, *tensors))

    return run


def _stream(kind: str, context: Any, buffer: Any) -> AbstractContextManager[Any]:
    """Let torch work in the stream in which the program's own kernels run, so that all is done in order."""
    import torch

    module = torch.get_device_module(kind)
    _, index = buffer.__dlpack_device__()
    return module.stream(module.get_stream_from_external(context.stream, index))
