# SPDX-License-Identifier: Apache-2.0
"""Steps of a plan, launched: on tensors, or bound beforehand to all but addresses. Forward and backward are made of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from normkit import plan
from normkit.layout import RowStrides, row_layout
from normkit.prepared import Start
from normkit.spec import Problem

from . import jit

# kernels and calls to keep; those forgotten are still compiled
MOST = 1024

_kernels: dict[tuple[object, ...], jit.Kernel] = {}


def launch(step: plan.Step, arguments: Mapping[str, Any]) -> None:
    """Launch a step on tensors; None for what there is not."""
    kernel = jit.kernel_of(step)
    if jit.is_interpreted(kernel):
        given = {name: arguments[name] for name in kernel.arg_names if name not in step.constants}
        kernel[step.grid](**given, **step.constants)
        return
    tensors = [(name, arguments[name]) for name in kernel.arg_names if name.endswith("_ptr")]
    dtypes = tuple([(name, None if tensor is None else tensor.dtype) for name, tensor in tensors])
    there = [tensor for _, tensor in tensors if tensor is not None]
    start = kernel_for(step, dtypes, there[0].device).bind(step.grid, arguments, max(map(_reach, there)))
    start(addresses_of([tensor for _, tensor in tensors]))


def _reach(tensor: Tensor) -> int:
    """Return the elements from the first to the last one of a tensor, with those between its rows."""
    return 1 + sum([(size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])


def bind(
    step: plan.Step, dtypes: Mapping[str, str | None], device: torch.device, scalars: Mapping[str, Any], elements: int
) -> Start:
    """Return what launches a step on contiguous arrays.

    Args:
        step: as planned.
        dtypes: of the arrays, in the order in which their addresses are given; None for one that there is not.
        device: where they are.
        scalars: the other run-time arguments, by name.
        elements: of the largest array.
    """
    pointers = [(f"{name}_ptr", None if dtype is None else getattr(torch, dtype)) for name, dtype in dtypes.items()]
    return kernel_for(step, tuple(pointers), device).bind(step.grid, scalars, elements)


def is_interpreted(step: plan.Step) -> bool:
    """Whether Triton interprets the kernel of a step, which then cannot be bound."""
    return jit.is_interpreted(jit.kernel_of(step))


def kernel_for(step: plan.Step, dtypes: tuple[tuple[str, torch.dtype | None], ...], device: torch.device) -> jit.Kernel:
    """Return the kernel of a step for arrays of these dtypes, by the names of its arguments."""
    key = (step.kernel, step.num_warps, *step.constants.values(), *dtypes, device)
    found = _kernels.get(key)
    if found is None:
        if len(_kernels) >= MOST:
            _kernels.clear()
        found = _kernels[key] = jit.Kernel(step, dict(dtypes), device)
    return found


def row_arguments(problem: Problem, tensors: Mapping[str, Tensor | None]) -> tuple[int, dict[str, object]]:
    """Return inner_rows, and pointer and row strides of each tensor; one whose rows cannot be reached so is copied."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    strides: dict[str, RowStrides | None] = dict.fromkeys(given, RowStrides(0, 0))
    inner_rows = 1
    if problem.layout != "contiguous":
        layout = row_layout(problem.shape, [tensor.stride() for tensor in given.values()])
        inner_rows, strides = layout.inner_rows, dict(zip(given, layout.strides, strict=True))
    arguments: dict[str, object] = {}
    for name, tensor in tensors.items():
        own = strides.get(name, RowStrides(0, 0))
        arguments[f"{name}_ptr"] = tensor if own is not None or tensor is None else tensor.contiguous()
        own = own or RowStrides(inner_rows * problem.hidden_size, problem.hidden_size)
        arguments[f"{name}_outer"], arguments[f"{name}_inner"] = own
    return inner_rows, arguments


def addresses_of(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Return the address of each tensor, 0 for what there is not."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def new(like: Tensor, shape: tuple[int, ...], dtype: str | None) -> Tensor | None:
    """Return memory on another tensor's device, None without a dtype."""
    return None if dtype is None else like.new_empty(shape, dtype=getattr(torch, dtype))
