# SPDX-License-Identifier: Apache-2.0
"""Vendors' operators within a program that JAX compiles: a callback into this process, on the program's own buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
    rows = [array for array in (x, residual) if array is not None]
    if problem.rows:
        present = [array is not None for array in arrays]
        call = buffer_callback(
            _callback(compute, problem, present, overwrites),
            [jax.ShapeDtypeStruct(problem.shape, numpy_dtype(problem.x_dtype)) for _ in rows],
            input_output_aliases={0: 0, 1: 1} if overwrites else None,
        )
        rows = call(*rows, *(array for array in parameters if array is not None))
    return Forward(rows[0], None if residual is None else rows[1], None, None)


def _callback(compute: Compute, problem: Problem, present: list[bool], overwrites: bool) -> Callable[..., None]:
    """Return what the program calls, with its buffers for the results, and for those of the operands that are present."""
    from torch.utils.dlpack import from_dlpack

    def from_capsule(buffer: Any) -> Any:
        return from_dlpack(buffer.__dlpack__())

    kind, spec, flat = DEVICES[problem.platform], problem.spec, (problem.rows, problem.hidden_size)
    # torch asks a buffer for its device, and a capsule for nothing; on a GPU it also has to say in which stream it works
    tensor = from_capsule if kind == "cpu" else from_dlpack
    adds, has_weight, has_bias = present[1:]
    is_flat = len(problem.shape) == 2

    def rows_of(buffers: Sequence[Any]) -> list[Any]:
        tensors = [tensor(buffer) for buffer in buffers]
        return tensors if is_flat else [one.view(flat) for one in tensors]

    def compute_from(results: Sequence[Any], buffers: Sequence[Any]) -> None:
        out = rows_of(results)
        # where the results overwrite x and residual, these are there already
        rows = out if overwrites else rows_of(buffers[: len(out)])
        weight = tensor(buffers[len(out)]) if has_weight else None
        bias = tensor(buffers[-1]) if has_bias else None
        given = Given(rows[0], rows[1] if adds else None, weight, bias)
        compute(spec, given, Results(out[0], out[1] if adds else None))

    def run(context: Any, results: Any, *buffers: Any) -> None:
        if kind == "cpu":
            compute_from(results, buffers)
        else:
            with _stream(kind, context, results[0]):
                compute_from(results, buffers)

    return run


def _stream(kind: str, context: Any, buffer: Any) -> AbstractContextManager[Any]:
    """Let torch work in the stream in which the program's own kernels run, so that all is done in order."""
    import torch

    module = torch.get_device_module(kind)
    _, index = buffer.__dlpack_device__()
    return module.stream(module.get_stream_from_external(context.stream, index))
