# SPDX-License-Identifier: Apache-2.0
"""From torch tensors to an implementation and back: what is done in a call that was not prepared, eager or of an operator."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normkit import layout, registry
from normkit.arrays import FLOAT_DTYPES, dtype_name, not_an_array
from normkit.call import Call
from normkit.errors import DtypeError
from normkit.interface import Forward, Gradients, Kernels, Wanted
from normkit.spec import Operand, Problem

from . import device, prepared
from .implementations import TABLE
from .memory import check_memory, check_writes

_NAMES = {getattr(torch, name): name for name in FLOAT_DTYPES}


def operand(name: str, tensor: Tensor) -> Operand:
    """Describe a tensor.

    Raises:
        DtypeError: it is not a tensor, or not a dense one.
    """
    if not isinstance(tensor, Tensor):
        raise not_an_array(name, tensor, "a torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise DtypeError(
            f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else f'one of layout {tensor.layout}'}"
        )
    return Operand(tuple(tensor.shape), _NAMES.get(tensor.dtype) or dtype_name(tensor.dtype), tensor.device)


def problem_of(call: Call, needs_grad: bool) -> Problem:
    """Validate a call and describe it, with what the tensors' device and strides say."""
    for name, tensor in call.arrays.items():
        operand(name, tensor)
    platform, arch = device.platform_of(call.x.device)
    rows = [tensor for tensor in (call.x, call.residual) if tensor is not None]
    return call.problem(operand, platform=platform, arch=arch, layout=layout_of(rows), needs_grad=needs_grad)


def layout_of(tensors: list[Tensor]) -> str:
    """Return `Problem.layout` of tensors that have one value for each element of x."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return "contiguous"
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1 or not tensors[0].ndim:
        return "strided"  # of no consequence: these shapes are refused when the call is described
    return layout.classify(tensors[0].shape, [tensor.stride() for tensor in tensors])


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but this package needs to know of a call: no tracer, no dispatch mode, no subclass, no lazy sign."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._get_tracing_state()
        or any(type(tensor) not in (Tensor, Parameter) or _is_special(tensor) for tensor in tensors if tensor is not None)
    )


def _is_special(tensor: Tensor) -> bool:
    """Whether a tensor's memory is not what its elements are, or is not there."""
    return tensor.is_neg() or tensor._is_zerotensor() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def forward(call: Call, needs_grad: bool) -> Forward:
    """Choose an implementation and compute; the results are contiguous, with statistics where a backward may follow.

    Calls like it are prepared: who calls this has looked for one that was.
    """
    problem = problem_of(call, needs_grad)
    check_memory(call.arrays)
    kernels, computed = registry.compute(problem, TABLE, call.implementation, partial(_forward, call, problem))
    prepared.keep(call, problem, kernels)
    return computed


def _forward(call: Call, problem: Problem, kernels: Kernels) -> Forward:
    y, residual_out, mean, rstd = kernels.forward(problem, call.x, call.residual, call.weight, call.bias)
    residual_out = None if residual_out is None else residual_out.contiguous()
    return Forward(y.contiguous(), residual_out, *((mean, rstd) if problem.needs_grad else (None, None)))


def forward_(call: Call, known_as: object = None) -> None:
    """Choose an implementation and compute in place.

    Args:
        call: the arguments.
        known_as: what calls like it are prepared by, as in `prepared.forward`; by default the function's name.
    """
    problem = problem_of(call, needs_grad=False)
    check_writes(call)
    kernels, _ = registry.compute(
        problem,
        TABLE,
        call.implementation,
        lambda kernels: kernels.forward_(problem, call.x, call.residual, call.weight, call.bias),
    )
    prepared.keep(call, problem, kernels, known_as)
    _count_as_written(call.x, call.residual)


def forward_into(call: Call) -> Forward:
    """Choose an implementation and compute into the tensors given; what it cannot write there is copied."""
    problem = problem_of(call, needs_grad=False)
    check_writes(call)
    kernels, computed = registry.compute(problem, TABLE, call.implementation, partial(_forward_into, call, problem))
    if hasattr(kernels, "forward_into"):
        prepared.keep(call, problem, kernels)
        _count_as_written(*call.outputs.values())
    return call.written(computed)


def _forward_into(call: Call, problem: Problem, kernels: Kernels) -> Forward:
    if not hasattr(kernels, "forward_into"):
        return _forward(call, problem, kernels)
    x = call.x
    out = call.room(problem, lambda dtype: torch.empty(problem.shape, dtype=getattr(torch, dtype), device=x.device))
    kernels.forward_into(problem, x, call.residual, call.weight, call.bias, out)
    return out


def _count_as_written(*tensors: Any) -> None:
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def backward(
    problem: Problem,
    wanted: Wanted,
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    implementation: str | None,
    known_as: tuple[object, ...],
) -> Gradients:
    """Choose an implementation and compute the gradients; they are contiguous.

    Args:
        problem: that of the forward call; layout, platform and arch are seen here.
        implementation: one by name.
        wanted: as in `normkit.interface.Kernels.backward`; so are the others.
        known_as: what passes like it are prepared by, as in `prepared.backward`.
    """
    _check_saved(problem, {"dy": dy, "dresidual_out": dresidual_out, "h": h}, weight, mean, rstd)
    platform, arch = device.platform_of(h.device)
    layout = layout_of([tensor for tensor in (dy, dresidual_out, h) if tensor is not None])
    if (platform, arch, layout) != (problem.platform, problem.arch, problem.layout):
        problem = replace(problem, platform=platform, arch=arch, layout=layout)
    tensors = (dy, dresidual_out, h, weight, mean, rstd)
    kernels, gradients = registry.compute(
        problem, TABLE, implementation, lambda kernels: kernels.backward(problem, wanted, *tensors)
    )
    prepared.keep_backward(known_as, problem, wanted, tensors, kernels)
    return Gradients(*(None if gradient is None else gradient.contiguous() for gradient in gradients))


def _check_saved(
    problem: Problem, rows: dict[str, Tensor | None], weight: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> None:
    """Refuse tensors that are not what the forward pass saved: hooks may give others, and data may have been replaced."""
    dtypes = {"dy": problem.out_dtype, "dresidual_out": problem.h_dtype, "h": problem.h_dtype}
    expected = [(name, tensor, problem.shape, dtypes[name]) for name, tensor in rows.items()]
    expected.append(("weight", weight, problem.shape[-1:], problem.weight_dtype or ""))
    expected += [
        ("mean", mean, problem.shape[:-1], problem.compute_dtype),
        ("rstd", rstd, problem.shape[:-1], problem.compute_dtype),
    ]
    for name, tensor, shape, dtype in expected:
        if tensor is not None and (tensor.shape != shape or _NAMES.get(tensor.dtype) != dtype):
            raise DtypeError(
                f"the backward pass needs {name} of shape {tuple(shape)} and {dtype}, as it was in the forward pass; "
                f"got {tuple(tensor.shape)} and {dtype_name(tensor.dtype)}: do not replace it between the two"
            )
    check_memory({name: tensor for name, tensor, _, _ in expected})
