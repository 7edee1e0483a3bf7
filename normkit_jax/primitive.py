# SPDX-License-Identifier: Apache-2.0
"""The norm as one differentiable JAX function: forward and backward each by the implementation chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from normkit.arrays import Array
from normkit.call import Call
from normkit.interface import Forward
from normkit.spec import Problem

from . import dispatch

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
    y, residual_out, _, _ = dispatch.forward(call, dispatch.problem_of(call, needs_grad=False))
    return y, residual_out


def _norm_forward(
    options: Call, x: Array, residual: Array | None, weight: Array | None, bias: Array | None
) -> tuple[tuple[Array, Array | None], Any]:
    call = options._replace(x=x, residual=residual, weight=weight, bias=bias)
    problem = dispatch.problem_of(call, needs_grad=True)
    y, residual_out, mean, rstd = dispatch.forward(call, problem)
    saved = (x if residual_out is None else residual_out, weight, mean, rstd)
    return (y, residual_out), (problem, saved)


def _norm_backward(options: Call, kept: Any, cotangents: tuple[Array, Array | None]) -> tuple[Array | None, ...]:
    problem, saved = kept
    dy, dresidual_out = cotangents
    gradients = dispatch.backward(problem, options.implementation, dy, dresidual_out, saved)
    dx, dresidual, dweight, dbias = gradients.by_operand(problem)
    return dx, dresidual if problem.residual_dtype else None, dweight, dbias


_norm.defvjp(_norm_forward, _norm_backward)
