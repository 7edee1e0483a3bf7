# SPDX-License-Identifier: Apache-2.0
"""The four functions for any array: NumPy's are computed here, those of PyTorch and JAX by their front ends."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import dispatch, registry
from .arrays import Array, framework_of
from .call import Arrays, Call, Options, bind
from .errors import OptionError
from .implementations import TABLE
from .registry import Verdict

_FRONT_ENDS = {"torch": "normkit_torch", "jax": "normkit_jax"}


def rms_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: object = None,
    out_dtype: object = None,
    implementation: str | None = None,
    out: Array | None = None,
) -> Array:
    r"""Normalise each row by its root mean square.

    $$y = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \text{eps}}} (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    Arguments, errors and arithmetic are those of `add_rms_norm`; residual_dtype must be None, as no residual is returned.

    Example:
        >>> import numpy as np
        >>> rms_norm(np.array([[1.0, 7.0]], np.float32), eps=0.0).round(3)
        array([[0.2, 1.4]], dtype=float32)
    """
    return compute(
        "rms_norm",
        (x, None, weight, bias, out, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: object = None,
    out_dtype: object = None,
    implementation: str | None = None,
    out: Array | None = None,
) -> Array:
    r"""Normalise each row to mean 0 and variance 1.

    $$y = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{var}(x) + \text{eps}}}
      (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with the biased variance. Arguments, errors and arithmetic are those of `add_rms_norm`; residual_dtype must be None.

    Example:
        >>> import numpy as np
        >>> layer_norm(np.array([[1.0, 2.0, 3.0]], np.float32), eps=0.0).round(3)
        array([[-1.225,  0.   ,  1.225]], dtype=float32)
    """
    return compute(
        "layer_norm",
        (x, None, weight, bias, out, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_rms_norm(
    x: Array,
    residual: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: object = None,
    out_dtype: object = None,
    implementation: str | None = None,
    out: Array | None = None,
    residual_out: Array | None = None,
) -> tuple[Array, Array]:
    r"""Add the residual and normalise each row of the sum by its root mean square (arXiv:1910.07467).

    $$h = x + \text{residual}, \qquad
      y = \frac{h}{\sqrt{\operatorname{mean}(h^2) + \text{eps}}} (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    Inputs are never changed. Arithmetic is in float32 (in float64 as soon as an array is float64), rounded once at the end.

    Args:
        x: array of shape (..., hidden_size) of NumPy, PyTorch or JAX, or one on the CPU that speaks DLPack (the result is
            then NumPy's); float32, bfloat16, float16 or float64; any strides.
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
        out: array of NumPy or PyTorch that y is written to, so that a loop can use its memory again: of y's shape and dtype,
            any strides, and in the memory of no other array of the call. By default y is a new array.
        residual_out: the same for residual_out; without a residual, x is copied there.

    Returns:
        y and residual_out, the h handed on, both of x's shape; `out` and `residual_out` themselves where they are given.

    Raises:
        ShapeError: the shapes do not belong together.
        DtypeError: an array is not of a supported dtype, or not an array.
        DeviceError: the arrays are on different devices.
        OptionError: an option has a value it cannot have, or an array cannot be written to.
        UnsupportedError: the implementation asked for cannot compute this.

    Example:
        >>> import numpy as np
        >>> x, residual = np.array([[1.0, 3.0]], np.float32), np.array([[0.0, 4.0]], np.float32)
        >>> y, residual_out = add_rms_norm(x, residual, eps=0.0)
        >>> y.round(3), residual_out
        (array([[0.2, 1.4]], dtype=float32), array([[1., 7.]], dtype=float32))
        >>> add_rms_norm(x, residual, eps=0.0, out=y, residual_out=residual_out)[0] is y
        True
    """
    return compute(
        "add_rms_norm",
        (x, residual, weight, bias, out, residual_out),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_layer_norm(
    x: Array,
    residual: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: object = None,
    out_dtype: object = None,
    implementation: str | None = None,
    out: Array | None = None,
    residual_out: Array | None = None,
) -> tuple[Array, Array]:
    r"""Add the residual and normalise each row of the sum to mean 0 and variance 1 (arXiv:1607.06450).

    $$h = x + \text{residual}, \qquad y = \frac{h - \operatorname{mean}(h)}{\sqrt{\operatorname{var}(h) + \text{eps}}}
      (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with the biased variance, computed from the centred values. All else is as in `add_rms_norm`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1.0, 2.0, 3.0]], np.float32)
        >>> y, residual_out = add_layer_norm(x, x, eps=0.0)
        >>> y.round(3), residual_out
        (array([[-1.225,  0.   ,  1.225]], dtype=float32), array([[2., 4., 6.]], dtype=float32))
    """
    return compute(
        "add_layer_norm",
        (x, residual, weight, bias, out, residual_out),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def explain(function: str, x: Array, *arrays: Array | None, **options: Any) -> list[Verdict]:
    """Say which implementation a call of one of the functions takes, and why not the others; nothing is computed.

    Args:
        function: the function's name, such as "add_rms_norm".
        x: as for that function.
        *arrays: as for that function.
        **options: as for that function.

    Returns:
        One Verdict for each implementation, in the order in which they are tried; the first one accepted runs.

    Example:
        >>> import numpy as np
        >>> [(verdict.name, verdict.accepted) for verdict in explain("rms_norm", np.ones((2, 8), np.float32))]
        [('ipex', False), ('vllm', False), ('cpu', True), ('reference', True)]
    """
    front_end = _front_end(x, options.get("out"), options.get("residual_out"))
    if front_end:
        verdicts: list[Verdict] = front_end.explain(function, x, *arrays, **options)
        return verdicts
    return registry.explain(dispatch.problem_of(dispatch.as_numpy(bind(globals(), function, x, *arrays, **options))), TABLE)


def compute(function: str, arrays: Arrays, options: Options) -> Any:
    """Compute a call on NumPy arrays, or hand it to the front end of its arrays' framework; see `Call.of`."""
    front_end = _front_end(arrays[0], *arrays[4:])
    if front_end:
        return front_end.functional.compute(function, arrays, options)
    call = dispatch.as_numpy(Call.of(function, arrays, options))
    return call.result(dispatch.forward_into(call) if call.writes else dispatch.forward(call))


def _front_end(x: Array, *outputs: Array | None) -> Any:
    """Return the front end of an array's framework, None for NumPy."""
    framework = framework_of(x) or ""
    if framework == "jax" and any(output is not None for output in outputs):
        raise OptionError(
            "out= and residual_out= are arrays to write to, and JAX's arrays never change: leave them out; under jax.jit, "
            "normkit_jax.add_rms_norm_ and add_layer_norm_ use the memory of donated arguments again"
        )
    return import_module(_FRONT_ENDS[framework]) if framework in _FRONT_ENDS else None
