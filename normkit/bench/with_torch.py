# SPDX-License-Identifier: Apache-2.0
"""Programs on torch tensors: normkit_torch, plain PyTorch with and without its compiler, vendors' operators, and the copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from ..arrays import numpy_dtype
from ..vendors import ipex, vllm
from .contest import Arrays, Contest, Program

Call = Callable[[], Any]
Bind = Callable[[Arrays], Call]
"""Gives a contestant its tensors: what it returns is a forward call."""


def normkit_torch(contest: Contest) -> Program:
    """normkit's function for tensors, in place the one that writes into x and residual."""
    function = _normkit(contest)

    def implementation(tensors: Arrays) -> str:
        given = _leaves(tensors) if contest.pass_ == "backward" else list(tensors[:4])
        verdicts = import_module("normkit_torch").explain(function.func.__name__, *given, eps=contest.eps)
        return next(verdict.name for verdict in verdicts if verdict.accepted)

    return program(contest, lambda tensors: partial(function, *tensors[:4]))._replace(implementation=implementation)


def _normkit(contest: Contest) -> partial[Any]:
    name = f"add_{contest.kind}_norm{'_' if contest.pass_ == 'in-place' else ''}"
    return partial(getattr(import_module("normkit_torch"), name), eps=contest.eps)


def eager(contest: Contest) -> Program:
    """An addition and torch's own norm."""
    function = _plain(contest)
    return program(contest, lambda tensors: partial(function, *tensors[:4]))


def compiled(contest: Contest) -> Program:
    """The same by torch.compile, for these shapes alone."""
    return _compiled(contest, _plain(contest))


def normkit_compiled(contest: Contest) -> Program:
    """normkit's function by torch.compile, which shows what its operator costs in a graph."""
    return _compiled(contest, _normkit(contest))


def _compiled(contest: Contest, function: Callable[..., Any]) -> Program:
    import torch

    # otherwise what was compiled for earlier contests counts towards the limit of recompilations
    torch.compiler.reset()
    found = torch.compile(function, dynamic=False)
    return program(contest, lambda tensors: partial(found, *tensors[:4]))


def vllm_operator(contest: Contest) -> Program:
    """vLLM's operator, which works in place: otherwise in clones of x and residual."""
    import torch

    return in_place_operator(contest, torch.ops._C.fused_add_rms_norm)


def in_place_operator(contest: Contest, operator: Callable[..., Any]) -> Program:
    """An operator that writes y into x and the sum into the residual: otherwise in clones of them."""

    def bind(tensors: Arrays) -> Call:
        if contest.pass_ == "in-place":
            return partial(operator, tensors.x, tensors.residual, tensors.weight, contest.eps)

        def of_clones() -> Any:
            y, residual_out = tensors.x.clone(), tensors.residual.clone()
            operator(y, residual_out, tensors.weight, contest.eps)
            return y, residual_out

        return of_clones

    return program(contest, bind)


def vllm_refusal(contest: Contest) -> str | None:
    """Return why vLLM's operator does not compute a contest."""
    if vllm.found().problem:
        return vllm.found().problem
    if contest.kind != "rms":
        return "vLLM has no LayerNorm that adds"
    if contest.pass_ == "backward":
        return "vLLM's operators have no backward pass"
    if contest.case.hidden_size % 8:
        return "vLLM wants a hidden size that is a multiple of 8 on the CPU, and is slow at others"
    return None


def ipex_operator(contest: Contest) -> Program:
    """IPEX's function, whose y is always new memory; without add_back it does not return the sum, which is then added again."""
    functional = import_module("intel_extension_for_pytorch.llm.functional")
    operator = functional.add_rms_norm if contest.kind == "rms" else functional.add_layer_norm

    def bind(tensors: Arrays) -> Call:
        given = tensors.residual, tensors.x, tensors.weight, tensors.bias, contest.eps
        if contest.pass_ == "in-place":
            return partial(operator, *given, True)
        return lambda: (operator(*given, False), tensors.x + tensors.residual)

    return program(contest, bind)


def ipex_refusal(contest: Contest) -> str | None:
    """Return why IPEX's functions do not compute a contest."""
    return ipex.found().problem or ("IPEX's functions have no backward pass" if contest.pass_ == "backward" else None)


def copy(contest: Contest) -> Program:
    """A copy that reads and writes as many bytes as the contest moves."""
    count = max(1, contest.moved_bytes // 2 // numpy_dtype(contest.dtype).itemsize)

    def put(arrays: Arrays) -> tuple[Any, Any]:
        like = _shared(arrays.x)
        # written, as memory that never was has no pages of its own
        return like.new_ones(count), like.new_ones(count)

    return Program(put, lambda buffers: partial(buffers[1].copy_, buffers[0]), None)


def _plain(contest: Contest) -> Callable[..., Any]:
    """Return what users write without a fused function, of x, residual, weight and bias."""
    import torch

    hidden = (contest.case.hidden_size,)

    def norm(h: Any, weight: Any, bias: Any) -> Any:
        if contest.kind == "rms":
            return torch.nn.functional.rms_norm(h, hidden, weight, contest.eps)
        return torch.nn.functional.layer_norm(h, hidden, weight, bias, contest.eps)

    def forward(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        h = x + residual
        return norm(h, weight, bias), h

    def in_place(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        residual += x
        return norm(residual, weight, bias)

    return in_place if contest.pass_ == "in-place" else forward


def program(contest: Contest, bind: Bind) -> Program:
    """Return the program of a forward call, by which the pass of the contest is computed."""
    if contest.pass_ == "backward":
        return Program(_put, partial(_backward, bind), _gradients)
    if contest.pass_ == "in-place":
        return Program(_put, bind, _written, _reset)
    return Program(_put, bind, lambda tensors, returned: _results(returned))


def _put(arrays: Arrays) -> Arrays:
    return arrays.map(lambda array: _shared(array).clone())


def _reset(tensors: Arrays, arrays: Arrays) -> None:
    tensors.x.copy_(_shared(arrays.x))
    tensors.residual.copy_(_shared(arrays.residual))


def _leaves(tensors: Arrays) -> list[Any]:
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors[:4]]


def _backward(bind: Bind, tensors: Arrays) -> Call:
    import torch

    leaves = _leaves(tensors)
    x, residual, weight, bias = leaves
    outputs = bind(tensors._replace(x=x, residual=residual, weight=weight, bias=bias))()
    return partial(torch.autograd.grad, outputs, [leaf for leaf in leaves if leaf is not None], tensors[4:])


def _gradients(tensors: Arrays, returned: Any) -> dict[str, Any]:
    return dict(zip(("dx", "dresidual", "dweight", "dbias"), returned, strict=False))


def _results(returned: Any) -> dict[str, Any]:
    return dict(zip(("y", "residual_out"), returned, strict=True))


def _written(tensors: Arrays, returned: Any) -> dict[str, Any]:
    """Return the results of a call in place: y is what it returned, or in x where that is the residual's pair or nothing."""
    import torch

    return _results((returned if isinstance(returned, torch.Tensor) else tensors.x, tensors.residual))


def _shared(array: Any) -> Any:
    """Return a NumPy array as a tensor over the same memory; a tensor as it is."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    # NumPy's bfloat16 is none of its own
    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
