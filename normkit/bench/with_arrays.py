# SPDX-License-Identifier: Apache-2.0
"""Programs on the arrays of JAX and NumPy: normkit_jax, XLA alone, normkit itself, and NumPy alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from ..arrays import numpy_dtype
from .contest import Arrays, Contest, Program

Function = Callable[..., Any]
"""Of x, residual, weight and bias, of which the last may be None; returns y and residual_out."""


def normkit_jax(contest: Contest) -> Program:
    """normkit's function for JAX, under jit."""
    front_end = import_module("normkit_jax")
    return _under_jit(contest, _fused(contest, front_end))._replace(implementation=partial(_implementation, contest, front_end))


def plain_jax(contest: Contest) -> Program:
    """The formula in jax.numpy, under jit, for XLA to fuse."""
    return _under_jit(contest, _plain(contest, import_module("jax.numpy")))


def normkit(contest: Contest) -> Program:
    """normkit's function for NumPy."""
    core = import_module("normkit")
    return _at_once(_fused(contest, core))._replace(implementation=partial(_implementation, contest, core))


def plain_numpy(contest: Contest) -> Program:
    """The formula in NumPy."""
    return _at_once(_plain(contest, np))


def copy(contest: Contest) -> Program:
    """A copy that reads and writes as many bytes as the contest moves, where there is no torch to do that with all threads."""
    count = max(1, contest.moved_bytes // 2 // numpy_dtype(contest.dtype).itemsize)
    return Program(
        lambda arrays: (np.ones(count, numpy_dtype(contest.dtype)), np.ones(count, numpy_dtype(contest.dtype))),
        lambda buffers: partial(np.copyto, buffers[1], buffers[0]),
        None,
    )


def _fused(contest: Contest, front_end: Any) -> Function:
    return partial(getattr(front_end, f"add_{contest.kind}_norm"), eps=contest.eps)


def _implementation(contest: Contest, front_end: Any, arrays: Arrays) -> str:
    verdicts = front_end.explain(f"add_{contest.kind}_norm", *arrays[:4], eps=contest.eps)
    return next(verdict.name for verdict in verdicts if verdict.accepted)


def _plain(contest: Contest, xp: Any) -> Function:
    """Return the formula as users write it, with statistics in float32."""

    def function(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        h = x + residual
        centred = h.astype(xp.float32)
        if contest.kind == "layer":
            centred = centred - centred.mean(-1, keepdims=True)
        y = centred / xp.sqrt((centred * centred).mean(-1, keepdims=True) + contest.eps) * weight.astype(xp.float32)
        if bias is not None:
            y = y + bias.astype(xp.float32)
        return y.astype(x.dtype), h

    return function


def _at_once(function: Function) -> Program:
    def results(arrays: Arrays, returned: Any) -> dict[str, Any]:
        return dict(zip(("y", "residual_out"), returned, strict=True))

    return Program(_same, lambda arrays: partial(function, *arrays[:4]), results)


def _under_jit(contest: Contest, function: Function) -> Program:
    import jax

    def forward_and_backward(x: Any, residual: Any, weight: Any, bias: Any, *cotangents: Any) -> Any:
        outputs, vjp = jax.vjp(function, x, residual, weight, bias)
        return *outputs, *vjp(cotangents)

    def results(arrays: Arrays, returned: Any) -> dict[str, Any]:
        names = ("y", "residual_out", "dx", "dresidual", "dweight", "dbias")
        return {name: np.asarray(array) for name, array in zip(names, returned, strict=False) if array is not None}

    backward = contest.pass_ == "forward-and-backward"
    compiled = jax.jit(forward_and_backward if backward else function)
    operands = len(Arrays._fields) if backward else 4

    def ready(arrays: Arrays) -> Callable[[], Any]:
        given = arrays[:operands]
        return lambda: jax.block_until_ready(compiled(*given))

    return Program(_put, ready, results)


def _put(arrays: Arrays) -> Arrays:
    import jax

    return arrays.map(partial(jax.device_put, device=jax.devices("cpu")[0]))


def _same(arrays: Arrays) -> Arrays:
    return arrays
