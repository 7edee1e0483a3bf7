# SPDX-License-Identifier: Apache-2.0
"""The row mathematics for kernels of your own: call it inside `pl.pallas_call`, before or after your matmul.

The functions are plain operations on values that the kernel has loaded, so that normalised rows need not go through memory.
What they need of Pallas is little: they lower for TPU and for GPUs through Triton, and interpret everywhere. The exception is
float16 with a rounding policy of "stored" or "hf", which only interprets.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from normkit import reference
from normkit.arrays import cast, dtype_name, rounded
from normkit.errors import ShapeError
from normkit.spec import NormSpec, Operand, Problem, describe


def norm_rows(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    spec: NormSpec,
    out_dtype: DTypeLike | None = None,
    hidden_size: int | None = None,
) -> Array:
    r"""Normalise the rows of a block, as `rms_norm` and `layer_norm` do with those of an array.

    $$y = \frac{x - \text{mean}}{\sqrt{\operatorname{mean}((x - \text{mean})^2) + \text{eps}}}
          (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with mean = 0 for kind "rms". Arguments, errors and arithmetic are those of `add_norm_rows`.

    Example: the prologue of a matmul.
        >>> import jax, jax.numpy as jnp
        >>> from jax.experimental import pallas as pl
        >>> from normkit import NormSpec
        >>> def kernel(x, weight, matrix, out):
        ...     out[...] = norm_rows(x[...], weight[...], spec=NormSpec("rms", eps=0.0)) @ matrix[...]
        >>> call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((1, 2), jnp.float32), interpret=True)
        >>> call(jnp.array([[3.0, -3.0]]), jnp.ones(2), 2 * jnp.eye(2))
        Array([[ 2., -2.]], dtype=float32)
    """
    return _compute(_describe(spec, x, None, weight, bias, None, out_dtype), x, None, weight, bias, hidden_size)[0]


def add_norm_rows(
    x: Array,
    residual: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    spec: NormSpec,
    residual_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    hidden_size: int | None = None,
) -> tuple[Array, Array]:
    r"""Add the residual and normalise the rows of a block, as `add_rms_norm` and `add_layer_norm` do with those of an array.

    $$h = x + \text{residual}, \qquad
      y = \frac{h - \text{mean}}{\sqrt{\operatorname{mean}((h - \text{mean})^2) + \text{eps}}}
          (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with mean = 0 for kind "rms". The arithmetic is in float32 (in float64 as soon as a value is float64), rounded once at
    the end: give a matmul's product as it was accumulated, and out_dtype.

    Args:
        x: of shape (rows, columns); each row is whole, or whole and then padded.
        residual: of x's shape.
        weight: of shape (columns,) or (1, columns).
        bias: of shape (columns,) or (1, columns).
        spec: the mathematics; rounding None is "sum", and "hf" rounds the normalised value to x's dtype, so give x in that.
        residual_dtype: dtype of residual_out; by default that of residual.
        out_dtype: dtype of y; by default that of x.
        hidden_size: the length of a row, where the block has more columns. What these hold plays no part, whatever it is;
            y and residual_out are 0 there.

    Returns:
        y and residual_out, both of x's shape.

    Raises:
        ShapeError: the shapes do not belong together, or hidden_size is not from 1 to columns.
        DtypeError: a value or option has a dtype that is not supported.
        OptionError: there is a weight_offset, and no weight.

    Example: the epilogue of a matmul.
        >>> import jax, jax.numpy as jnp
        >>> from jax.experimental import pallas as pl
        >>> from normkit import NormSpec
        >>> def kernel(left, right, residual, y, residual_out):
        ...     product = jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)
        ...     y[...], residual_out[...] = add_norm_rows(product, residual[...], spec=NormSpec("rms", eps=0.0))
        >>> shape = jax.ShapeDtypeStruct((1, 2), jnp.float32)
        >>> call = pl.pallas_call(kernel, out_shape=(shape, shape), interpret=True)
        >>> call(jnp.array([[1.0, 3.0]]), jnp.eye(2), jnp.array([[2.0, -6.0]]))
        (Array([[ 1., -1.]], dtype=float32), Array([[ 3., -3.]], dtype=float32))
    """
    problem = _describe(spec, x, residual, weight, bias, residual_dtype, out_dtype)
    return _compute(problem, x, residual, weight, bias, hidden_size)


def _describe(
    spec: NormSpec,
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    residual_dtype: DTypeLike | None,
    out_dtype: DTypeLike | None,
) -> Problem:
    def operand(array: Array | None, parameter: bool = False) -> Operand | None:
        if array is None:
            return None
        # kernels for TPU hold a parameter as a block of one row
        row = parameter and array.ndim == 2 and array.shape[0] == 1
        return Operand(array.shape[1:] if row else array.shape, dtype_name(array.dtype))

    return describe(
        spec,
        Operand(x.shape, dtype_name(x.dtype)),
        operand(residual),
        operand(weight, parameter=True),
        operand(bias, parameter=True),
        returns_residual=residual is not None,
        residual_dtype=None if residual_dtype is None else dtype_name(residual_dtype),
        out_dtype=None if out_dtype is None else dtype_name(out_dtype),
    )


def _compute(
    problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None, hidden_size: int | None
) -> tuple[Array, Array]:
    """Do as `reference.forward` does, with a mask, and without operations that no result needs: Pallas may not have them."""
    spec = problem.spec
    hidden_size = problem.hidden_size if hidden_size is None else hidden_size
    within = _mask(x, hidden_size)
    h = cast(x, problem.compute_dtype)
    if residual is not None:
        h = h + cast(residual, problem.compute_dtype)
    h = _only(within, h)
    residual_out = cast(h, problem.h_dtype)
    if residual is not None and spec.rounding in ("stored", "hf"):
        h = _rounded(h, problem.h_dtype)
    mean, rstd = reference.statistics(spec, h) if within is None else _statistics(spec, h, within, hidden_size)
    x_hat = (h if mean is None else h - mean) * rstd
    if spec.rounding == "hf":
        x_hat = _rounded(x_hat, problem.x_dtype)
    return _only(within, reference.scale_and_shift(problem, x_hat, weight, bias)), residual_out


def _statistics(spec: NormSpec, h: Array, within: Array, hidden_size: int) -> tuple[Array | None, Array]:
    """Do as `reference.statistics` does, over the row without its padding."""
    mean = jnp.sum(h, axis=-1, keepdims=True) / hidden_size if spec.subtract_mean else None
    centred = h if mean is None else _only(within, h - mean)
    return mean, 1 / jnp.sqrt(jnp.sum(centred * centred, axis=-1, keepdims=True) / hidden_size + spec.eps)


def _rounded(h: Array, dtype: str) -> Array:
    """Do as `arrays.rounded` does; to bfloat16 in integers, as Pallas' compilers do not know its operations."""
    if (dtype, h.dtype) != ("bfloat16", jnp.float32):
        return rounded(h, dtype)
    bits = lax.bitcast_convert_type(h, jnp.uint32)
    # half a unit of the last place kept, less one where that place is even: a tie stays there
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isnan(h), h, lax.bitcast_convert_type(bits, jnp.float32))


def _only(within: Array | None, array: Array) -> Array:
    return array if within is None else jnp.where(within, array, 0)


def _mask(x: Array, hidden_size: int) -> Array | None:
    """Return where the rows are, None if they are everywhere."""
    columns = x.shape[-1]
    if not 1 <= hidden_size <= columns:
        raise ShapeError(f"hidden_size must be from 1 to {columns}, the columns of the block; got {hidden_size}")
    if hidden_size == columns:
        return None
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < hidden_size
