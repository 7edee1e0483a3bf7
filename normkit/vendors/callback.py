# SPDX-License-Identifier: Apache-2.0
"""Vendors' operators within a program that JAX compiles: a callback into this process, on the program's own buffers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..arrays import Array, numpy_dtype
from ..interface import Forward
from ..spec import Problem
from .exchange import Compute, Given, Results
from .guards import DEVICES


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
    from jax.experimental.buffer_callback import buffer_callback

    x, residual, *parameters = arrays
    overwrites = overwrites and residual is not None
    flat, dtype = (problem.rows, problem.hidden_size), numpy_dtype(problem.x_dtype)
    rows = [array.reshape(flat) for array in (x, residual) if array is not None]
    if problem.rows:
        present = [array is not None for array in arrays]
        call = buffer_callback(
            _callback(compute, problem, present, overwrites),
            [jax.ShapeDtypeStruct(flat, dtype) for _ in rows],
            input_output_aliases={0: 0, 1: 1} if overwrites else None,
        )
        rows = call(*rows, *(array for array in parameters if array is not None))
    y, residual_out = rows[0], rows[1] if residual is not None else None
    return Forward(*(None if array is None else array.reshape(problem.shape) for array in (y, residual_out, None, None)))


def _callback(compute: Compute, problem: Problem, present: list[bool], overwrites: bool) -> Callable[..., None]:
    """Return what the program calls, with its buffers for the results, and for those of the operands that are present."""
    from torch.utils.dlpack import from_dlpack

    def from_capsule(buffer: Any) -> Any:
        return from_dlpack(buffer.__dlpack__())

    kind, spec = DEVICES[problem.platform], problem.spec
    # torch asks a buffer for its device, and a capsule for nothing; on a GPU it also has to say in which stream it works
    tensor = from_capsule if kind == "cpu" else from_dlpack

    def run(context: Any, results: Any, *buffers: Any) -> None:
        with _stream(kind, context):
            out = [tensor(buffer) for buffer in results]
            # where the results overwrite x and residual, these are there already
            given = iter([*out, *map(tensor, buffers[2:])] if overwrites else [tensor(buffer) for buffer in buffers])
            operands = Given(*(next(given) if there else None for there in present))
            compute(spec, operands, Results(out[0], out[1] if present[1] else None))

    return run


def _stream(kind: str, context: Any) -> AbstractContextManager[Any]:
    """Let torch work in the stream in which the program's own kernels run, so that all is done in order."""
    if kind == "cpu":
        return nullcontext()
    import torch

    module = torch.get_device_module(kind)
    return module.stream(module.get_stream_from_external(context.stream))
