# SPDX-License-Identifier: Apache-2.0
"""The norm with its own gradient: what JAX's differentiation sees of the primitives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from normkit import reference
from normkit.arrays import Array, cast
from normkit.call import Call
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import Problem

from . import dispatch, primitive

jax.tree_util.register_static(Problem)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Types:
    """Those of x, residual, weight and bias: a gradient has the type of what it is the gradient of."""

    of: tuple[Any, ...]


def norm(call: Call) -> Forward:
    """Compute y and residual_out of a call."""
    options = call._replace(x=None, residual=None, weight=None, bias=None)
    y, residual_out = _norm(options, call.x, call.residual, call.weight, call.bias)
    return Forward(y, residual_out, None, None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(
    options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None
) -> tuple[Array, Array | None]:
    call = dispatch.varying_alike(options._replace(x=x, residual=residual, weight=weight, bias=bias))
    problem = dispatch.problem_of(call, needs_grad=False)
    y, residual_out, _, _ = primitive.forward(problem, options.implementation, *_operands(call))
    return y, residual_out


def _norm_forward(
    options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None
) -> tuple[tuple[Array, Array | None], Any]:
    given = options._replace(x=x, residual=residual, weight=weight, bias=bias)
    call = dispatch.varying_alike(given)
    problem = dispatch.problem_of(call, needs_grad=True)
    y, residual_out, mean, rstd = _forward(problem, options.implementation, *_operands(call))
    saved = (call.x if residual_out is None else residual_out, call.weight, mean, rstd)
    types = _Types(tuple(None if array is None else jax.typeof(array) for array in _operands(given)))
    return (y, residual_out), (problem, types, saved)


def _operands(call: Call) -> tuple[Array, Array | None, Array | None, Array | None]:
    return call.x, call.residual, call.weight, call.bias


def _norm_backward(options: Call, kept: Any, cotangents: tuple[Array, Array | None]) -> tuple[Array | None, ...]:
    problem, types, saved = kept
    # what is still to be summed over devices is rounded only afterwards
    varying = _varying(jax.typeof(saved[0]))
    summed = [name for name, of in zip(("weight", "bias"), types.of[2:], strict=True) if of and varying - _varying(of)]
    wide = replace(problem, **dict.fromkeys((f"{name}_dtype" for name in summed), problem.compute_dtype))
    gradients = _backward(wide, options.implementation, Wanted.by(problem), *cotangents, *saved)
    return tuple(map(_of_type, gradients.by_operand(problem), types.of))


def _of_type(gradient: Array | None, of: Any) -> Array | None:
    """Return the gradient as that of an operand, which may be the same on more devices than the rows are."""
    if gradient is None:
        return None
    if missing := tuple(_varying(jax.typeof(gradient)) - _varying(of)):
        gradient = jax.lax.psum(gradient, missing)
    if jax.typeof(gradient).sharding != of.sharding:
        gradient = jax.reshard(gradient, of.sharding)
    return cast(gradient, of.dtype.name)


def _varying(of: Any) -> frozenset[str]:
    return frozenset(of.manual_axis_type.varying)


_norm.defvjp(_norm_forward, _norm_backward)


def _with_gradient_of(slow: Callable[..., Any], fast: Callable[..., Any], statics: int) -> Any:
    """Return `fast` with the gradient of `slow`, made of JAX's own operations: for second and higher derivatives."""

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return fast(*arguments), arguments[statics:]

    def backward(*arguments: Any) -> Any:
        *static, operands, cotangents = arguments
        return jax.vjp(partial(slow, *static), *operands)[1](cotangents)

    function = jax.custom_vjp(fast, nondiff_argnums=tuple(range(statics)))
    function.defvjp(forward, backward)
    return function


def _slow_forward(problem: Problem, implementation: str | None, *operands: Array | None) -> Forward:
    return reference.forward(problem, *operands)


def _slow_backward(problem: Problem, implementation: str | None, wanted: Wanted, *operands: Array | None) -> Gradients:
    return reference.backward(problem, wanted, *operands)


_forward = _with_gradient_of(_slow_forward, primitive.forward, statics=2)
_backward = _with_gradient_of(_slow_backward, primitive.backward, statics=3)
