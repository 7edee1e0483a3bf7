# SPDX-License-Identifier: Apache-2.0
"""The public functions for JAX arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jax import Array
from jax.typing import DTypeLike

from normkit import registry
from normkit.call import Arrays, Call, Options, bind
from normkit.registry import Verdict

from . import device, dispatch, gradient
from .dispatch import ArrayLike
from .implementations import TABLE


def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Normalise each row by its root mean square.

    $$y = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \text{eps}}} (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    Arguments, errors and arithmetic are those of `add_rms_norm`; residual_dtype must be None, as no residual is returned.

    Example:
        >>> import jax.numpy as jnp
        >>> rms_norm(jnp.array([[3.0, -3.0]]), eps=0.0)
        Array([[ 1., -1.]], dtype=float32)
    """
    return compute(
        "rms_norm",
        (x, None, weight, bias, None, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Normalise each row to mean 0 and variance 1.

    $$y = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{var}(x) + \text{eps}}}
      (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with the biased variance. Arguments, errors and arithmetic are those of `add_rms_norm`; residual_dtype must be None.

    Example:
        >>> import jax.numpy as jnp
        >>> layer_norm(jnp.array([[1.0, 2.0, 3.0]]), eps=0.0).round(3)
        Array([[-1.225,  0.   ,  1.225]], dtype=float32)
    """
    return compute(
        "layer_norm",
        (x, None, weight, bias, None, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    r"""Add the residual and normalise each row of the sum by its root mean square (arXiv:1910.07467).

    $$h = x + \text{residual}, \qquad
      y = \frac{h}{\sqrt{\operatorname{mean}(h^2) + \text{eps}}} (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    Inputs are never changed. Arithmetic is in float32 (in float64 as soon as an array is float64), rounded once at the end.
    Gradients flow through both results to every array; jit, vmap, scan, shard_map and jax.checkpoint apply.

    Args:
        x: JAX or NumPy array, or what has __jax_array__ as flax.nnx.Param does, of shape (..., hidden_size); float32, bfloat16,
            float16, or float64 where jax_enable_x64 is set: without it NumPy's float64 becomes float32, as everywhere in JAX.
        residual: of x's shape, any of these dtypes. With None, h is x, and residual_out is x itself.
        weight: of shape (hidden_size,), any of these dtypes; None means ones.
        bias: of shape (hidden_size,), any of these dtypes; None means zeros.
        eps: added to the mean square, inside the root.
        weight_offset: added to the weight, 1.0 for Gemma; needs a weight.
        rounding: which h is normalised. "sum": the unrounded sum. "stored": the sum rounded to residual_out's dtype, so that
            fused equals unfused. "hf": "stored", and the normalised value is rounded to x's dtype before it meets the weight,
            as in Hugging Face's LlamaRMSNorm. None: whichever the implementation does best.
        residual_dtype: dtype of residual_out; by default that of residual, or of x without one.
        out_dtype: dtype of y; by default that of x.
        implementation: one by name, as `explain` lists them; None chooses.

    Returns:
        y and residual_out, the h handed on, both of x's shape.

    Raises:
        ShapeError: the shapes do not belong together.
        DtypeError: an array is not of a supported dtype, or not an array.
        DeviceError: the arrays are committed to different devices.
        OptionError: an option has a value it cannot have.
        UnsupportedError: the implementation asked for cannot compute this.

    Example:
        >>> import jax.numpy as jnp
        >>> x, residual = jnp.array([[1.0, 3.0]]), jnp.array([[2.0, -6.0]])
        >>> y, residual_out = add_rms_norm(x, residual, eps=0.0)
        >>> y, residual_out
        (Array([[ 1., -1.]], dtype=float32), Array([[ 3., -3.]], dtype=float32))
    """
    return compute(
        "add_rms_norm",
        (x, residual, weight, bias, None, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    r"""Add the residual and normalise each row of the sum to mean 0 and variance 1 (arXiv:1607.06450).

    $$h = x + \text{residual}, \qquad y = \frac{h - \operatorname{mean}(h)}{\sqrt{\operatorname{var}(h) + \text{eps}}}
      (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with the biased variance, computed from the centred values. All else is as in `add_rms_norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0, 3.0]])
        >>> y, residual_out = add_layer_norm(x, x, eps=0.0)
        >>> y.round(3), residual_out
        (Array([[-1.225,  0.   ,  1.225]], dtype=float32), Array([[2., 4., 6.]], dtype=float32))
    """
    return compute(
        "add_layer_norm",
        (x, residual, weight, bias, None, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_rms_norm_(
    x: ArrayLike,
    residual: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Do as `add_rms_norm` does, with y in the memory of x and residual_out in that of residual, where a kernel computes it.

    For arguments that are donated to jit, and others that are not needed again: nothing is then copied or allocated. It stays
    a function of JAX: XLA makes a copy of an array that is still needed, which costs more than `add_rms_norm` would.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> step = jax.jit(add_rms_norm_, donate_argnums=(0, 1))
        >>> y, residual_out = step(jnp.array([[1.0, 3.0]]), jnp.array([[2.0, -6.0]]))
        >>> residual_out
        Array([[ 3., -3.]], dtype=float32)
    """
    return compute(
        "add_rms_norm_", (x, residual, weight, bias, None, None), (eps, weight_offset, rounding, None, None, implementation)
    )


def add_layer_norm_(
    x: ArrayLike,
    residual: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Do as `add_layer_norm` does, with y in the memory of x and residual_out in that of residual; see `add_rms_norm_`.

    Example:
        >>> import jax.numpy as jnp
        >>> add_layer_norm_(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 4.0]]), eps=0.0)[0]
        Array([[-1.,  1.]], dtype=float32)
    """
    return compute(
        "add_layer_norm_", (x, residual, weight, bias, None, None), (eps, weight_offset, rounding, None, None, implementation)
    )


def explain(function: str, x: ArrayLike, *arrays: ArrayLike | None, **options: Any) -> list[Verdict]:
    """Say which implementation a call of one of the functions takes, and why not the others; nothing is computed.

    Args:
        function: the function's name, such as "add_rms_norm".
        x: as for that function; so are all other arguments.
        *arrays: residual, weight and bias.
        **options: the keyword arguments.

    Returns:
        One Verdict for each implementation, in the order in which they are tried; the first one accepted runs.

    Example:
        >>> import jax.numpy as jnp
        >>> [(verdict.name, verdict.accepted) for verdict in explain("rms_norm", jnp.ones((2, 8)))]
        [('ipex', False), ('vllm', False), ('triton', False), ('cpu', True), ('reference', True)]
    """
    call = dispatch.as_jax(bind(globals(), function, x, *arrays, **options))
    problem = dispatch.problem_of(call, needs_grad=False)
    arch = device.arch_of(problem.platform, device.devices_of(call.x))
    return registry.explain(replace(problem, arch=arch), TABLE)


def compute(function: str, arrays: Arrays, options: Options) -> Any:
    """Compute a call, eagerly or under any of JAX's transformations; see `normkit.call.Call.of`."""
    call = dispatch.as_jax(Call.of(function, arrays, options))
    return call.result(gradient.norm(call))
