# SPDX-License-Identifier: Apache-2.0
"""The `cpu` implementation: torch tensors to the C++ kernels of normkit.cpu."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from normkit.cpu import library, prepared
from normkit.cpu.library import supports
from normkit.interface import Forward, Gradients, Guarded, Run, Wanted
from normkit.layout import row_layout
from normkit.spec import Problem

from . import allocate

__all__ = ["backward", "forward", "forward_", "forward_into", "prepare", "supports"]

_CPU = torch.device("cpu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _openmp() -> tuple[int, int]:
    """Return the addresses of GNU OpenMP's functions in this process, whose threads torch uses; 0 if it has another."""
    if os.name == "nt":
        return library.OWN_THREADS  # a process there has no names of its own
    process = ctypes.CDLL(None)
    functions = [getattr(process, name, None) for name in ("GOMP_parallel", "omp_get_thread_num")]
    parallel, number = (ctypes.cast(function, ctypes.c_void_p).value or 0 if function else 0 for function in functions)
    return parallel, number


_OPENMP = _openmp()


def _forked() -> None:
    """Use threads of our own: those of OpenMP are not there in a process that was forked, which would wait for them."""
    global _OPENMP
    _OPENMP = library.OWN_THREADS


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def forward(problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Forward:
    """Compute y, residual_out and, if a backward may follow, the statistics."""
    statistics = "float32" if problem.needs_grad else None
    out = Forward(
        _new(problem.shape, problem.out_dtype),
        _new(problem.shape, problem.residual_out_dtype),
        _new(problem.shape[:-1], statistics if problem.spec.subtract_mean else None),
        _new(problem.shape[:-1], statistics),
    )
    forward_into(problem, x, residual, weight, bias, out)
    return out


def forward_(problem: Problem, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Write y into x and residual_out into residual."""
    forward_into(problem, x, residual, weight, bias, Forward(x, residual, None, None))


def forward_into(
    problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Forward
) -> None:
    """Write the results into the tensors of `out`, of any strides; y may be x itself, and residual_out the residual."""
    y, residual_out, mean, rstd = out
    rows: tuple[int, ...]
    inner_rows, rows = 1, (problem.shape[-1], 0) * 4
    are_contiguous = y.is_contiguous() and (residual_out is None or residual_out.is_contiguous())
    if problem.layout != "contiguous" or not are_contiguous:
        (x, residual, y, residual_out), inner_rows, rows = _laid_out(problem, x, residual, y, residual_out)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    pointers = (
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if residual_out is None else residual_out.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
    )
    library.forward(problem, pointers, rows, inner_rows, torch.get_num_threads(), _OPENMP)
    if y is not out.y:
        out.y.copy_(y)
    if out.residual_out is not None and out.residual_out is not residual_out:
        out.residual_out.copy_(residual_out)


def prepare(guarded: Guarded) -> Run | None:
    """Return what computes calls like one before, compiled, where that can be."""
    return prepared.compiled(guarded, torch.get_num_threads(), _OPENMP)


def _laid_out(problem: Problem, *tensors: Tensor | None) -> tuple[list[Any], int, tuple[int, ...]]:
    """Return the tensors, those copied whose rows two loops do not reach, inner_rows, and the strides of each one's rows."""
    apart = [None if tensor is None or tensor.is_contiguous() else tensor for tensor in tensors]
    layout = row_layout(problem.shape, [tensor.stride() for tensor in apart if tensor is not None])
    found = iter(layout.strides)
    rows: tuple[int, ...] = ()
    reached: list[Any] = []
    for tensor, strided in zip(tensors, apart, strict=True):
        own = None if strided is None else next(found)
        reached.append(strided.contiguous() if strided is not None and own is None else tensor)
        rows += own or (layout.inner_rows * problem.hidden_size, problem.hidden_size)
    return reached, layout.inner_rows, rows


def backward(
    problem: Problem,
    wanted: Wanted,
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> Gradients:
    """Compute the gradients, dweight and dbias by partial sums over a fixed division of the rows."""
    shape, hidden = problem.shape, problem.shape[-1:]
    gradients = Gradients(
        _new(shape, problem.x_dtype if wanted.dx else None),
        _new(shape, problem.residual_dtype if wanted.dresidual else None),
        _new(hidden, problem.weight_dtype if wanted.dweight else None),
        _new(hidden, problem.bias_dtype if wanted.dbias else None),
    )
    rows: tuple[int, ...]
    inner_rows, rows = 1, (problem.hidden_size, 0) * 3
    if problem.layout != "contiguous":
        (dy, dresidual_out, h), inner_rows, rows = _laid_out(problem, dy, dresidual_out, h)
    # kept here, so that a copy lives as long as the call
    given = (dy, dresidual_out, h, *(None if tensor is None else tensor.contiguous() for tensor in (weight, mean, rstd)))
    pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in given + gradients)
    library.backward(problem, pointers, rows, inner_rows, torch.get_num_threads(), _OPENMP)
    return gradients


def _new(shape: tuple[int, ...], dtype: str | None) -> Tensor | None:
    return None if dtype is None else allocate.maker(shape, _DTYPES[dtype], _CPU)()
