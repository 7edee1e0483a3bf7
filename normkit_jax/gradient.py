# SPDX-License-Identifier: Apache-2.0
"""The norm with its own gradient: what JAX's differentiation sees of the primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad
from jax.interpreters import partial_eval as pe

from normkit import reference
from normkit.arrays import Array, cast
from normkit.call import Call
from normkit.interface import Forward, Wanted
from normkit.spec import Problem

from . import dispatch, primitive
from .operands import Signature, backward_signature, forward_signature


@jax.tree_util.register_static
class _Known(NamedTuple):
    """What the backward pass knows before any value.

    Attributes:
        problem: that of the forward call.
        types: those of x, residual, weight and bias, None for one that is absent; a gradient has its operand's type.
    """

    problem: Problem
    types: tuple[Any, ...]


def norm(call: Call) -> Forward:
    """Compute y and residual_out of a call."""
    options = replace(call, x=None, residual=None, weight=None, bias=None)
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


def _norm_forward(options: Call, *operands: Array | None) -> tuple[tuple[Array, Array | None], Any]:
    call = dispatch.varying_alike(_call(options, *operands))
    problem = dispatch.problem_of(call, needs_grad=True)
    y, residual_out, mean, rstd = primitive.forward(problem, options.implementation, *_operands(call))
    saved = (call.x if residual_out is None else residual_out, call.weight, mean, rstd)
    types = tuple(None if operand is None else jax.typeof(operand) for operand in operands)
    return (y, residual_out), (_Known(problem, types), saved)


def _call(options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Call:
    return replace(options, x=x, residual=residual, weight=weight, bias=bias)


def _operands(call: Call) -> tuple[Array, Array | None, Array | None, Array | None]:
    return call.x, call.residual, call.weight, call.bias


def _norm_backward(options: Call, kept: tuple[_Known, Any], cotangents: tuple[Array, Array | None]) -> tuple[Array | None, ...]:
    (problem, types), saved = kept
    # what is still to be summed over devices is rounded only afterwards
    varying = _varying(jax.typeof(saved[0]))
    summed = [name for name, of in zip(("weight", "bias"), types[2:], strict=True) if of and varying - _varying(of)]
    dtypes: dict[str, Any] = dict.fromkeys((f"{name}_dtype" for name in summed), problem.compute_dtype)
    gradients = primitive.backward(replace(problem, **dtypes), options.implementation, Wanted.by(problem), *cotangents, *saved)
    return tuple(map(_of_type, gradients.by_operand(problem), types))


def _of_type(gradient: Array | None, of: Any) -> Array | None:
    """Return the gradient as that of an operand, which may be the same on more devices than the rows are."""
    if gradient is None or of is None:
        return None
    if missing := tuple(_varying(jax.typeof(gradient)) - _varying(of)):
        gradient = jax.lax.psum(gradient, missing)
    # the mesh may differ: arrays that are not sharded need not have one
    sharding = jax.typeof(gradient).sharding
    if sharding.spec != of.sharding.spec:
        gradient = jax.reshard(gradient, sharding.update(spec=of.sharding.spec) if of.sharding.mesh.empty else of.sharding)
    return cast(gradient, of.dtype.name)


def _varying(of: Any) -> frozenset[str]:
    return frozenset(of.manual_axis_type.varying)


_norm.defvjp(_norm_forward, _norm_backward)


def _jvp_rule(of: Primitive, signature: Callable[..., Signature], compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule for the tangents of a primitive: those of the reference, whose operations JAX differentiates further."""

    def rule(
        primals: Sequence[Array], tangents: Sequence[Any], problem: Problem, implementation: str | None, **wanted: Wanted
    ) -> tuple[list[Array], list[Any]]:
        slots = signature(problem, **wanted)
        varied = [index for index, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

        def results_of(*given: Array) -> list[Array]:
            operands = list(primals)
            for index, array in zip(varied, given, strict=True):
                operands[index] = array
            return slots.made(compute(problem, **wanted, **slots.named(operands)))

        given = [primals[index] for index in varied], [tangents[index] for index in varied]
        results = of.bind(*primals, problem=problem, implementation=implementation, **wanted)
        return results, jax.jvp(results_of, *given)[1]

    return rule


ad.primitive_jvps[primitive.forward_p] = _jvp_rule(primitive.forward_p, forward_signature, reference.forward)
ad.primitive_jvps[primitive.backward_p] = _jvp_rule(primitive.backward_p, backward_signature, reference.backward)


def _dce_rule(used: Sequence[bool], *live_and_equation: Any) -> tuple[list[bool], Any]:
    """Leave out gradients that nothing uses: under jit a frozen weight costs nothing."""
    # before the equation, jax 0.12 says which of its operands live
    equation = live_and_equation[-1]
    if not any(used):
        return [False] * len(equation.invars), None
    remaining = iter(used)
    wanted = Wanted(*(asked and next(remaining) for asked in equation.params["wanted"]))
    outvars = [variable for variable, kept in zip(equation.outvars, used, strict=True) if kept]
    return [True] * len(equation.invars), equation.replace(outvars=outvars, params=equation.params | {"wanted": wanted})


pe.dce_rules[primitive.backward_p] = _dce_rule
