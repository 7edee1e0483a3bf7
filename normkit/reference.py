# SPDX-License-Identifier: Apache-2.0
"""The definition: forward and backward once, in plain operations on arrays of NumPy, PyTorch or JAX.

It is an implementation like any other, the last choice on every platform, and in float64 the oracle of all tests.
"""

from __future__ import annotations

from .arrays import Array, cast, namespace, rounded, rsqrt
from .interface import Forward, Gradients, Rejected, Wanted
from .spec import NormSpec, Problem


def supports(problem: Problem) -> Rejected | None:
    """Accept every problem."""
    return None


def forward(problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Forward:
    """Compute y, residual_out and the statistics in the problem's compute dtype; see `NormSpec` for the equation."""
    spec, compute = problem.spec, problem.compute_dtype
    h = cast(x, compute)
    if residual is not None:
        h = h + cast(residual, compute)
    residual_out = cast(h, problem.residual_out_dtype) if problem.residual_out_dtype else None
    keeps_other = problem.residual_out_dtype not in (None, compute)
    if keeps_other and spec.rounding in ("stored", "hf"):
        h = rounded(h, problem.h_dtype)
    mean, rstd = statistics(spec, h)
    x_hat = (h - mean if mean is not None else h) * rstd
    if spec.rounding == "hf":
        x_hat = rounded(x_hat, problem.x_dtype)
    y = scale_and_shift(problem, x_hat, weight, bias)
    if keeps_other and problem.needs_grad and spec.rounding in (None, "sum"):
        # the backward pass has the rounded h, and needs the statistics of just that
        mean, rstd = statistics(spec, rounded(h, problem.h_dtype))
    return Forward(y, residual_out, mean if mean is None else mean[..., 0], rstd[..., 0])


def scale_and_shift(problem: Problem, x_hat: Array, weight: Array | None, bias: Array | None) -> Array:
    """Return y = x_hat (weight_offset + weight) + bias, rounded once, from x_hat in the compute dtype."""
    y = x_hat
    if weight is not None:
        y = y * effective_weight(problem.spec, cast(weight, problem.compute_dtype))
    if bias is not None:
        y = y + cast(bias, problem.compute_dtype)
    return cast(y, problem.out_dtype)


def statistics(spec: NormSpec, h: Array) -> tuple[Array | None, Array]:
    """Return the mean (None for RMSNorm) and rstd of each row of h, with a last dimension of 1."""
    xp = namespace(h)
    mean = xp.mean(h, axis=-1, keepdims=True) if spec.subtract_mean else None
    centred = h if mean is None else h - mean
    return mean, rsqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + spec.eps)


def effective_weight(spec: NormSpec, weight: Array) -> Array:
    """Return weight_offset + weight."""
    return spec.weight_offset + weight if spec.weight_offset else weight


def backward(
    problem: Problem,
    wanted: Wanted,
    dy: Array,
    dresidual_out: Array | None,
    h: Array,
    weight: Array | None,
    mean: Array | None = None,
    rstd: Array | None = None,
) -> Gradients:
    r"""Compute the gradients; mean and rstd are computed from h where they are not given.

    $$\hat{x} = (h - \text{mean})\,\text{rstd}, \qquad g = dy\,(\text{weight\_offset} + \text{weight})$$
    $$dh = \text{rstd}\,(g - \hat{x} \operatorname{mean}(\hat{x} g) - \operatorname{mean}(g)) + d\text{residual\_out}$$

    where mean(g) is there for LayerNorm only; dx and dresidual are dh, dweight is the sum of dy x_hat over all rows
    and dbias that of dy.
    """
    compute = problem.compute_dtype
    dy, h = cast(dy, compute), cast(h, compute)
    if rstd is None:
        mean, rstd = statistics(problem.spec, h)
    else:
        mean, rstd = mean if mean is None else mean[..., None], rstd[..., None]
    x_hat = (h if mean is None else h - mean) * rstd
    dx = dresidual = dweight = dbias = None
    if wanted.dx or wanted.dresidual:
        dh = _dh(problem.spec, dy, x_hat, weight if weight is None else cast(weight, compute), rstd)
        if dresidual_out is not None:
            dh = dh + cast(dresidual_out, compute)
        dx = cast(dh, problem.x_dtype) if wanted.dx else None
        dresidual = cast(dh, problem.residual_dtype or problem.x_dtype) if wanted.dresidual else None
    if wanted.dweight and problem.weight_dtype:
        dweight = cast(_sum_of_rows(dy * x_hat), problem.weight_dtype)
    if wanted.dbias and problem.bias_dtype:
        dbias = cast(_sum_of_rows(dy), problem.bias_dtype)
    return Gradients(dx, dresidual, dweight, dbias)


def _dh(spec: NormSpec, dy: Array, x_hat: Array, weight: Array | None, rstd: Array) -> Array:
    xp = namespace(dy)
    g = dy if weight is None else dy * effective_weight(spec, weight)
    dh = g - x_hat * xp.mean(x_hat * g, axis=-1, keepdims=True)
    if spec.subtract_mean:
        dh = dh - xp.mean(g, axis=-1, keepdims=True)
    return dh * rstd


def _sum_of_rows(array: Array) -> Array:
    # not through a reshape to one dimension of rows, for which JAX would have to gather a sharded array
    return array.sum(tuple(range(array.ndim - 1))) if array.ndim > 1 else array


def forward_(problem: Problem, x: Array, residual: Array, weight: Array | None, bias: Array | None) -> None:
    """Compute as `forward` does, then write y into x and residual_out into residual."""
    y, residual_out, _, _ = forward(problem, x, residual, weight, bias)
    x[...] = y
    residual[...] = residual_out
