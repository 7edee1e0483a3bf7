# SPDX-License-Identifier: Apache-2.0
"""The torch operators, opaque to torch.compile and torch.export: schema, implementation and fake of each.

`normkit::norm` is every functional form, `normkit::norm_` the in-place ones, `normkit::norm_backward` the gradient. The others
are what the first and the last become once autograd has seen them, and what a compiled graph calls: autograd asks Python about
an operator that has a derivative each time it runs. An operator cannot return None or one of its inputs: what is not computed
is an empty tensor or not there. Each argument costs time in each call, so those that are seldom given share a string of words:
"add_rms_norm rounding=hf out_dtype=float32" is a function and options, "rms x_dtype=bfloat16" a kind and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from normkit.arrays import dtype_name
from normkit.call import FUNCTIONS, Call
from normkit.errors import OptionError
from normkit.interface import Gradients, Wanted
from normkit.spec import NormSpec, Problem

from . import device, dispatch, prepared

LIBRARY = torch.library.Library("normkit", "DEF")

_NORM = "Tensor? weight, Tensor? bias, str function, float eps, float weight_offset"
_GRADIENT = (
    "(Tensor dy, Tensor? dresidual_out, Tensor h, Tensor? weight, Tensor? mean, Tensor rstd,"
    " str kind, float eps, float weight_offset, bool[] wanted)"
)
_OPTIONS = ("rounding", "residual_dtype", "out_dtype", "implementation")
_FACTS = ("x_dtype", "residual_dtype", "bias_dtype", "residual_out_dtype", "rounding", "implementation")


def words(first: str, names: tuple[str, ...], values: tuple[Any, ...]) -> str:
    """Return one string of what is not None."""
    return " ".join([first, *[f"{name}={value}" for name, value in zip(names, values, strict=True) if value is not None]])


@cache
def _values(string: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return what `words` was given: the first word, and the values of the names."""
    first, *rest = string.split(" ")
    given = dict(word.partition("=")[::2] for word in rest)
    if not set(given) <= set(names):
        raise OptionError(f"{string!r} is not a word followed by some of {', '.join(f'{name}=...' for name in names)}")
    return first, *(given.get(name) for name in names)


def arguments_of(call: Call) -> tuple[Any, ...]:
    """Return the operators' arguments for a call."""
    function = words(call.function, _OPTIONS, (call.rounding, *call.dtypes().values(), call.implementation))
    return call.x, call.residual, call.weight, call.bias, function, call.eps, call.weight_offset


def call_of(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, function: str, eps: float, offset: float
) -> Call:
    """Return the call that an operator's arguments are."""
    name, *options = _values(function, _OPTIONS)
    if name not in FUNCTIONS:
        raise OptionError(f"{name!r} is not one of the functions {', '.join(FUNCTIONS)}")
    return Call(name, x, residual, weight, bias, eps, offset, *options)


def hands_on(call: Call) -> bool:
    """Whether residual_out is computed, and not x itself."""
    dtype = call.residual_dtype
    return call.residual is not None or (dtype is not None and getattr(torch, dtype_name(dtype)) != call.x.dtype)


def filled(like: Tensor, results: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Return results with an empty tensor for each that there is not."""
    return tuple([like.new_empty(0) if result is None else result for result in results])


def there(results: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the results that there are."""
    return [result for result in results if result is not None]


@lru_cache(1024, typed=True)
def known(function: str, eps: float, weight_offset: float, needs_grad: bool, *more: bool) -> prepared.Known:
    """Return what the calls of an operator are prepared by; `more` is what the guard sees too little of."""
    name, *options = _values(function, _OPTIONS)
    return prepared.known((name, *more) if more else name, (eps, weight_offset, *options), needs_grad)


def known_in_place(x: Tensor, residual: Tensor, function: str, eps: float, weight_offset: float) -> prepared.Known:
    """Return what the calls of the operator in place are prepared by."""
    # what decides on what may be written to, and which the guard of a prepared call does not see below autograd
    inference = torch.is_inference_mode_enabled(), x.is_inference(), residual.is_inference()
    return known(function, eps, weight_offset, False, *inference)


def _computed(arguments: tuple[Any, ...], needs_grad: bool) -> Any:
    tensors = (*arguments[:4], None, None)
    return prepared.again(known(*arguments[4:], needs_grad), tensors) or dispatch.forward(call_of(*arguments), needs_grad)


def _faked(arguments: tuple[Any, ...], needs_grad: bool) -> tuple[Tensor | None, ...]:
    call = call_of(*arguments)
    problem = call.problem(dispatch.operand)
    statistics = problem.compute_dtype if needs_grad else None
    x = call.x
    return (
        _new(x, x.shape, problem.out_dtype),
        _new(x, x.shape, problem.residual_out_dtype),
        _new(x, x.shape[:-1], statistics if problem.spec.subtract_mean else None),
        _new(x, x.shape[:-1], statistics),
    )


def _new(like: Tensor, shape: Any, dtype: str | None) -> Tensor | None:
    return None if dtype is None else like.new_empty(shape, dtype=getattr(torch, dtype))


def _norm_in_place(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, function: str, *numbers: float
) -> None:
    known_as = known_in_place(x, residual, function, *numbers)
    if not prepared.again(known_as, (x, residual, weight, bias, None, None)):
        dispatch.forward_(call_of(x, residual, weight, bias, function, *numbers), known_as[0])


def _norm_in_place_fake(*arguments: Any) -> None:
    call_of(*arguments).problem(dispatch.operand)


def gradient_arguments(problem: Problem, wanted: Wanted, implementation: str | None) -> tuple[Any, ...]:
    """Return the arguments of the operators for gradients that follow the tensors."""
    spec = problem.spec
    dtypes = (problem.x_dtype, problem.residual_dtype, problem.bias_dtype, problem.residual_out_dtype)
    return words(spec.kind, _FACTS, (*dtypes, spec.rounding, implementation)), spec.eps, spec.weight_offset, list(wanted)


def gradient_problem(
    dy: Tensor, h: Tensor, weight: Tensor | None, kind: str, eps: float, weight_offset: float, **facts: Any
) -> Problem:
    """Return the call that a gradient is of."""
    weight_dtype = None if weight is None else weight.dtype
    # sizes that are symbols cannot be looked up
    describe = _described if all(type(size) is int for size in h.shape) else _described.__wrapped__
    return describe(tuple(h.shape), dy.dtype, weight_dtype, kind, eps, weight_offset, **facts)


@lru_cache(1024)
def _described(
    shape: tuple[int, ...],
    out_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    kind: str,
    eps: float,
    weight_offset: float,
    **facts: Any,
) -> Problem:
    name, x_dtype, residual_dtype, bias_dtype, residual_out_dtype, rounding, _ = _values(kind, _FACTS)
    return Problem(
        spec=NormSpec(name, eps, weight_offset, rounding),
        shape=shape,
        x_dtype=x_dtype,
        residual_dtype=residual_dtype,
        weight_dtype=None if weight_dtype is None else dtype_name(weight_dtype),
        bias_dtype=bias_dtype,
        out_dtype=dtype_name(out_dtype),
        residual_out_dtype=residual_out_dtype,
        needs_grad=True,
        **facts,
    )


def known_gradients(h: Tensor, kind: str, eps: float, weight_offset: float, wanted: list[bool]) -> prepared.Known:
    """Return what the calls of the operators for gradients are prepared by."""
    return kind, eps, weight_offset, h.shape, *wanted


def gradients_again(known_as: prepared.Known, tensors: Any, wanted: list[bool]) -> Gradients | None:
    """Compute gradients if such were prepared, of dy, dresidual_out, h, weight, mean and rstd; None if not."""
    made = prepared.backward(known_as, tensors)
    if made is None:
        return None
    # by operand: one dh may be there twice
    return Gradients(*[gradient if asked else None for gradient, asked in zip(made, wanted, strict=False)])


def _gradients(*arguments: Any) -> Gradients:
    dy, dresidual_out, h, weight, mean, rstd, kind, eps, weight_offset, wanted = arguments
    known_as = known_gradients(h, kind, eps, weight_offset, wanted)
    made = gradients_again(known_as, arguments[:6], wanted)
    if made is not None:
        return made
    platform, arch = device.platform_of(h.device)  # as it would be described anew otherwise
    problem = gradient_problem(dy, h, weight, kind, eps, weight_offset, platform=platform, arch=arch)
    implementation = _values(kind, _FACTS)[-1]
    return dispatch.backward(problem, Wanted(*wanted), dy, dresidual_out, h, weight, mean, rstd, implementation, known_as)


def _gradients_fake(
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    kind: str,
    eps: float,
    weight_offset: float,
    wanted: list[bool],
) -> list[Tensor | None]:
    problem = gradient_problem(dy, h, weight, kind, eps, weight_offset)
    dtypes = (problem.x_dtype, problem.residual_dtype, problem.weight_dtype, problem.bias_dtype)
    shapes = (h.shape, h.shape, h.shape[-1:], h.shape[-1:])
    given = zip(shapes, dtypes, wanted, strict=True)
    return [_new(h, shape, dtype) if asked else None for shape, dtype, asked in given]


def _two(x: Tensor, made: Any) -> Any:
    return made[:2] if made[1] is not None else (made[0], x.new_empty(0))


Results = Callable[[Tensor, Any], Any]
_TWO = "(Tensor y, Tensor residual_out)"
_FOUR = "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
# Of each: what it returns, by x and y, residual_out, mean, rstd; and whether it computes the last two.
FORWARD: dict[str, tuple[str, Results, bool]] = {
    "norm": (_TWO, _two, False),
    "norm_alone": ("Tensor", lambda x, made: made[0], False),
    "norm_and_residual": (_TWO, _two, False),
    "norm_and_statistics": ("Tensor[]", lambda x, made: there(made[:4]), True),
}
# The same, by h and the gradients.
BACKWARD: dict[str, tuple[str, Results]] = {
    "norm_backward": (_FOUR, filled),
    "norm_gradients": ("Tensor[]", lambda h, made: there(made)),
}


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normkit::{name}", fake, lib=LIBRARY)


def _define_forward(name: str, returned: str, results: Results, needs_grad: bool) -> None:
    _define(
        name,
        f"(Tensor x, Tensor? residual, {_NORM}) -> {returned}",
        lambda *arguments: results(arguments[0], _computed(arguments, needs_grad)),
        lambda *arguments: results(arguments[0], _faked(arguments, needs_grad)),
    )


def _define_backward(name: str, returned: str, results: Results) -> None:
    _define(
        name,
        f"{_GRADIENT} -> {returned}",
        lambda *arguments: results(arguments[2], _gradients(*arguments)),
        lambda *arguments: results(arguments[2], _gradients_fake(*arguments)),
    )


for _name, _row in FORWARD.items():
    _define_forward(_name, *_row)
_define("norm_", f"(Tensor(a!) x, Tensor(b!) residual, {_NORM}) -> ()", _norm_in_place, _norm_in_place_fake)
for _name, _gradient_row in BACKWARD.items():
    _define_backward(_name, *_gradient_row)
