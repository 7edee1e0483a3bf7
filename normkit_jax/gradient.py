# SPDX-License-Identifier: Apache-2.0
"""The norm with its own gradient: what JAX's differentiation sees of the primitives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from normkit import reference
from normkit.arrays import Array
from normkit.call import Call
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import Problem

from . import dispatch, primitive

jax.tree_util.register_static(Problem)


def norm(call: Call) -> Forward:
    """Compute y and residual_out of a call."""
    options = call._replace(x=None, residual=None, weight=None, bias=None)
    y, residual_out = _norm(options, call.x, call.residual, call.weight, call.bias)
    return Forward(y, residual_out, None, None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(
    options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None
) -> tuple[Array, Array | None]:
    call = options._replace(x=x, residual=residual, weight=weight, bias=bias)
    problem = dispatch.problem_of(call, needs_grad=False)
    y, residual_out, _, _ = primitive.forward(problem, options.implementation, x, residual, weight, bias)
    return y, residual_out


def _norm_forward(
    options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None
) -> tuple[tuple[Array, Array | None], Any]:
    call = options._replace(x=x, residual=residual, weight=weight, bias=bias)
    problem = dispatch.problem_of(call, needs_grad=True)
    y, residual_out, mean, rstd = _forward(problem, options.implementation, x, residual, weight, bias)
    saved = (x if residual_out is None else residual_out, weight, mean, rstd)
    return (y, residual_out), (problem, saved)


def _norm_backward(options: Call, kept: Any, cotangents: tuple[Array, Array | None]) -> tuple[Array | None, ...]:
    problem, saved = kept
    gradients = _backward(problem, options.implementation, Wanted.by(problem), *cotangents, *saved)
    dx, dresidual, dweight, dbias = gradients.by_operand(problem)
    return dx, dresidual if problem.residual_dtype else None, dweight, dbias


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
