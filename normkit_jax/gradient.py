# SPDX-License-Identifier: Apache-2.0
"""The norm with its own gradient: what JAX's differentiation sees of the primitives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from normkit import reference
from normkit.arrays import Array, cast
from normkit.call import Call
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import Problem

from . import dispatch, primitive


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Known:
    """What the backward pass knows before any value.

    Attributes:
        problem: that of the forward call.
        wanted: the gradients that are asked for.
        types: those of x, residual, weight and bias, None for one that is absent; a gradient has its operand's type.
    """

    problem: Problem
    wanted: Wanted
    types: tuple[Any, ...]


def norm(call: Call) -> Forward:
    """Compute y and residual_out of a call."""
    options = call._replace(x=None, residual=None, weight=None, bias=None)
    y, residual_out = _norm(options, call.x, call.residual, call.weight, call.bias)
    return Forward(y, residual_out, None, None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(
    options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None
) -> tuple[Array, Array | None]:
    call = dispatch.varying_alike(_call(options, x, residual, weight, bias))
    problem = dispatch.problem_of(call, needs_grad=False)
    y, residual_out, _, _ = primitive.forward(problem, options.implementation, *_operands(call))
    return y, residual_out


def _norm_forward(options: Call, *primals: Any) -> tuple[tuple[Array, Array | None], Any]:
    operands = [None if primal is None else primal.value for primal in primals]
    call = dispatch.varying_alike(_call(options, *operands))
    problem = dispatch.problem_of(call, needs_grad=True)
    y, residual_out, mean, rstd = _forward(problem, options.implementation, *_operands(call))
    saved = (call.x if residual_out is None else residual_out, call.weight, mean, rstd)
    wanted = Wanted.by(problem, *(primal is not None and primal.perturbed for primal in primals))
    types = tuple(None if operand is None else jax.typeof(operand) for operand in operands)
    return (y, residual_out), (_Known(problem, wanted, types), saved)


def _call(options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Call:
    return options._replace(x=x, residual=residual, weight=weight, bias=bias)


def _operands(call: Call) -> tuple[Array, Array | None, Array | None, Array | None]:
    return call.x, call.residual, call.weight, call.bias


def _norm_backward(options: Call, kept: tuple[_Known, Any], cotangents: Any) -> tuple[Array | None, ...]:
    known, saved = kept
    problem, wanted = known.problem, known.wanted
    dy, dresidual_out = (None if isinstance(cotangent, SymbolicZero) else cotangent for cotangent in cotangents)
    if dy is None:
        # not through the kernel: a rstd that is infinite would make zeros NaN
        gradients = Gradients(dresidual_out if wanted.dx else None, dresidual_out if wanted.dresidual else None, None, None)
    else:
        # what is still to be summed over devices is rounded only afterwards
        varying = _varying(jax.typeof(saved[0]))
        summed = [name for name, of in zip(("weight", "bias"), known.types[2:], strict=True) if of and varying - _varying(of)]
        dtypes: dict[str, Any] = dict.fromkeys((f"{name}_dtype" for name in summed), problem.compute_dtype)
        gradients = _backward(replace(problem, **dtypes), options.implementation, wanted, dy, dresidual_out, *saved)
    return tuple(map(_of_type, gradients.by_operand(problem), known.types))


def _of_type(gradient: Array | None, of: Any) -> Array | None:
    """Return the gradient as that of an operand, which may be the same on more devices than the rows are."""
    if gradient is None or of is None:
        return None
    if missing := tuple(_varying(jax.typeof(gradient)) - _varying(of)):
        gradient = jax.lax.psum(gradient, missing)
    # the mesh may differ: arrays that are not sharded need not have one
    if jax.typeof(gradient).sharding.spec != of.sharding.spec:
        gradient = jax.reshard(gradient, of.sharding)
    return cast(gradient, of.dtype.name)


def _varying(of: Any) -> frozenset[str]:
    return frozenset(of.manual_axis_type.varying)


# with symbolic zeros both learn what is not asked for or has no gradient, which is then neither computed nor read
_norm.defvjp(_norm_forward, _norm_backward, symbolic_zeros=True)


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
