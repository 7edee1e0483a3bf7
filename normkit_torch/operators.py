# SPDX-License-Identifier: Apache-2.0
"""The functions as torch operators, opaque to torch.compile and torch.export: schema, fake and autograd.

`normkit::norm` is every functional form, `normkit::norm_` the in-place ones, `normkit::norm_backward` the gradient.
An operator cannot return None or one of its inputs: what is not computed is returned as an empty tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from normkit import reference, registry
from normkit.arrays import dtype_name
from normkit.call import Call
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import NormSpec, Problem

from . import allocate, device, dispatch, prepared
from .implementations import TABLE
from .memory import check_writes

_HAVE_MEMORY = (Tensor, torch.nn.Parameter)
_OPTIONS = (
    "str function, float eps, float weight_offset, str? rounding, str? residual_dtype, str? out_dtype, str? implementation"
)
_NORM = (
    f"norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_OPTIONS}, bool needs_grad)"
    " -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)"
)
_NORM_IN_PLACE = f"norm_(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, Tensor? bias, {_OPTIONS}) -> ()"
_NORM_BACKWARD = (
    "norm_backward(Tensor dy, Tensor? dresidual_out, Tensor h, Tensor? weight, Tensor mean, Tensor rstd,"
    " str kind, float eps, float weight_offset, str? rounding,"
    " str x_dtype, str? residual_dtype, str? bias_dtype, str? residual_out_dtype, bool[] wanted, str? implementation)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def norm(call: Call, needs_grad: bool) -> Any:
    """Compute a functional call through the operator; tensors to write to are copied into."""
    arguments = _arguments(call)
    if call.writes:
        call.check_outputs(dispatch.operand)
        # what memory a compiler's tensors and subclasses have cannot be seen; no input is lost, as copying comes last
        if not torch.compiler.is_compiling() and all(
            type(tensor) in _HAVE_MEMORY for tensor in (*call.arrays.values(), *call.outputs.values())
        ):
            check_writes(call)
    y, residual_out, _, _ = torch.ops.normkit.norm(*arguments, needs_grad)
    widened = call.residual_dtype is not None and getattr(torch, dtype_name(call.residual_dtype)) != call.x.dtype
    computed = call.residual is not None or widened
    return call.result(call.written(Forward(y, residual_out if computed else None, None, None)))


def norm_(call: Call) -> Any:
    """Compute an in-place call through the operator."""
    torch.ops.normkit.norm_(*_arguments(call))
    return call.x, call.residual


def _arguments(call: Call) -> tuple[Any, ...]:
    for name, tensor in call.arrays.items():
        dispatch.operand(name, tensor)
    if not torch.compiler.is_compiling():
        # what the operator's schema would refuse with an error of its own
        NormSpec(call.kind, call.eps, call.weight_offset, call.rounding)
        if call.implementation is not None:
            registry.find(TABLE, call.implementation)
    tensors = (call.x, call.residual, call.weight, call.bias)
    options = (call.function, call.eps, call.weight_offset, call.rounding)
    return tensors + options + (*call.dtypes().values(), call.implementation)


def _pack(like: Tensor, results: Iterable[Tensor | None]) -> Four:
    a, b, c, d = (like.new_empty(0) if result is None else result for result in results)
    return a, b, c, d


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, function: str, *options_and_grad: Any
) -> Four:
    # what `dispatch.forward` would look for too, after some microseconds
    options, needs_grad = options_and_grad[:-1], options_and_grad[-1]
    made = prepared.forward(function, (x, residual, weight, bias, None, None), options, needs_grad)
    if made is None:
        return _pack(x, dispatch.forward(_call(x, residual, weight, bias, function, *options), needs_grad))
    y, residual_out, mean, rstd, _ = made
    return (
        y,
        allocate.without_elements(x) if residual_out is None else residual_out,
        allocate.without_elements(x) if mean is None else mean,
        allocate.without_elements(x) if rstd is None else rstd,
    )


def _call(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, function: str, *options: Any) -> Call:
    return Call(function, x, residual, weight, bias, *options)


def _norm_fake(*arguments: Any) -> Four:
    *call, needs_grad = arguments
    problem = _call(*call).problem(dispatch.operand)
    x = arguments[0]
    statistics = problem.compute_dtype if needs_grad else None
    return _pack(
        x,
        (
            _new(x, x.shape, problem.out_dtype),
            _new(x, x.shape, problem.residual_out_dtype),
            _new(x, x.shape[:-1], statistics if problem.spec.subtract_mean else None),
            _new(x, x.shape[:-1], statistics),
        ),
    )


def _new(like: Tensor, shape: Any, dtype: str | None) -> Tensor | None:
    return None if dtype is None else like.new_empty(shape, dtype=getattr(torch, dtype))


def _norm_in_place(x: Tensor, residual: Tensor, *rest: Any) -> None:
    call = _call(x, residual, *rest)
    # what decides on what may be written to, and which the guard of a prepared call does not see below autograd
    inference = torch.is_inference_mode_enabled(), x.is_inference(), residual.is_inference()
    dispatch.forward_(call, (call.function, inference))


def _norm_in_place_fake(*call: Any) -> None:
    _call(*call).problem(dispatch.operand)


def _gradient_problem(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    kind: str,
    eps: float,
    weight_offset: float,
    rounding: str | None,
    x_dtype: str,
    residual_dtype: str | None,
    bias_dtype: str | None,
    residual_out_dtype: str | None,
    **facts: Any,
) -> Problem:
    return Problem(
        spec=NormSpec(kind, eps, weight_offset, rounding),
        shape=tuple(h.shape),
        x_dtype=x_dtype,
        residual_dtype=residual_dtype,
        weight_dtype=None if weight is None else dtype_name(weight.dtype),
        bias_dtype=bias_dtype,
        out_dtype=dtype_name(dy.dtype),
        residual_out_dtype=residual_out_dtype,
        needs_grad=True,
        **facts,
    )


def _norm_backward(
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *options: Any,
) -> Four:
    *options_of_problem, wanted, implementation = options
    platform, arch = device.platform_of(h.device)
    problem = _gradient_problem(dy, h, weight, *options_of_problem, platform=platform, arch=arch)
    statistics = (mean if problem.spec.subtract_mean else None, rstd)
    gradients = dispatch.backward(problem, Wanted(*wanted), dy, dresidual_out, h, weight, *statistics, implementation)
    return _pack(h, gradients)


def _norm_backward_fake(
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *options: Any,
) -> Four:
    *options_of_problem, wanted, _ = options
    problem = _gradient_problem(dy, h, weight, *options_of_problem)
    dtypes = (problem.x_dtype, problem.residual_dtype, problem.weight_dtype, problem.bias_dtype)
    shapes = (h.shape, h.shape, h.shape[-1:], h.shape[-1:])
    given = zip(shapes, dtypes, wanted, strict=True)
    return _pack(h, [_new(h, shape, dtype) if asked else None for shape, dtype, asked in given])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    call = _call(*inputs[:-1])
    _, residual_out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    problem = call.problem(dispatch.operand)
    ctx.save_for_backward(residual_out if problem.residual_out_dtype else call.x, call.weight, mean, rstd)
    ctx.problem, ctx.implementation = problem, call.implementation


def _autograd(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = Wanted.by(ctx.problem, *ctx.needs_input_grad[:4])
    gradients = backward(ctx.problem, ctx.implementation, wanted, dy, dresidual_out, *ctx.saved_tensors)
    return *gradients, *(None,) * 8


def backward(
    problem: Problem,
    implementation: str | None,
    wanted: Wanted,
    dy: Tensor | None,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, residual, weight and bias through the operator, where y or residual_out has one."""
    if problem.residual_out_dtype is None:
        dresidual_out = None
    if dy is None:
        return _passed_on(problem, wanted, dresidual_out).by_operand(problem)
    spec = problem.spec
    mathematics = (spec.kind, spec.eps, spec.weight_offset, spec.rounding)
    dtypes = (problem.x_dtype, problem.residual_dtype, problem.bias_dtype, problem.residual_out_dtype)
    mean = rstd.new_empty(0) if mean is None else mean
    results = torch.ops.normkit.norm_backward(
        dy, dresidual_out, h, weight, mean, rstd, *mathematics, *dtypes, list(wanted), implementation
    )
    gradients = Gradients(*(result if asked else None for result, asked in zip(results, wanted, strict=True)))
    return gradients.by_operand(problem)


def _passed_on(problem: Problem, wanted: Wanted, dresidual_out: Tensor | None) -> Gradients:
    """Return the gradients where only residual_out has one: it goes straight to x and residual."""
    if dresidual_out is None:
        return Gradients(None, None, None, None)
    dtypes = ((wanted.dx, problem.x_dtype), (wanted.dresidual, problem.residual_dtype))
    dx, dresidual = (dresidual_out.to(getattr(torch, str(dtype))) if asked else None for asked, dtype in dtypes)
    return Gradients(dx, dresidual, None, None)


def _setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    dy, dresidual_out, h, weight, _, _, *options = inputs
    *options_of_problem, wanted, _ = options
    ctx.save_for_backward(dy, dresidual_out, h, weight)
    ctx.problem = _gradient_problem(dy, h, weight, *options_of_problem)
    ctx.wanted = Wanted(*wanted)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient: that of the reference, which is made of differentiable operations."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that differentiation stops here and does not go on from dy to the weight that y was made with
        inputs: list[Any] = [tensor if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        gradients = reference.backward(ctx.problem, ctx.wanted, *inputs)
    asked = {index: inputs[index] for index, needed in enumerate(ctx.needs_input_grad[:4]) if needed}
    made = [(made, dt) for made, dt in zip(gradients, cotangents, strict=True) if made is not None and made.requires_grad]
    outputs, grads = [gradient for gradient, _ in made], [dt for _, dt in made]
    if not outputs:
        return (None,) * 16
    found = torch.autograd.grad(outputs, list(asked.values()), grads, create_graph=create_graph, allow_unused=True)
    by_index = dict(zip(asked, found, strict=True))
    return *(by_index.get(index) for index in range(4)), *(None,) * 12


LIBRARY = torch.library.Library("normkit", "DEF")
for _schema, _run, _fake in (
    (_NORM, _norm, _norm_fake),
    (_NORM_IN_PLACE, _norm_in_place, _norm_in_place_fake),
    (_NORM_BACKWARD, _norm_backward, _norm_backward_fake),
):
    _name = LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normkit::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("normkit::norm", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("normkit::norm_backward", _double_backward, setup_context=_setup_double_backward, lib=LIBRARY)
