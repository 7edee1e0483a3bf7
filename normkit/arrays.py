# SPDX-License-Identifier: Apache-2.0
"""What NumPy, PyTorch and JAX arrays do differently. Imports NumPy alone: an array's framework is loaded already."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from .errors import DtypeError

Array = Any
"""An array of NumPy, PyTorch or JAX; within one call all arrays are of one framework."""

FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")


def framework_of(array: object) -> str | None:
    """Name the framework of an array: "numpy", "torch" or "jax", or None if it belongs to none of them.

    Example:
        >>> import numpy as np
        >>> framework_of(np.ones(3))
        'numpy'
    """
    if isinstance(array, np.ndarray):
        return "numpy"
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch"
    if jax is not None and isinstance(array, jax.Array):
        return "jax"
    return None


def not_an_array(name: str, value: object, expected: str) -> DtypeError:
    """Return the error for an argument that is not an array of the framework.

    Args:
        name: of the argument.
        value: what was given.
        expected: what it must be.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    is_size = name == "weight" and isinstance(value, int | tuple | list)
    hint = "; give the weight itself, such as ones of shape (hidden_size,): there is no normalized_shape" if is_size else ""
    return DtypeError(f"{name} must be {expected}, got {kind}{hint}")


def namespace(array: Array) -> ModuleType:
    """Return the module with the array functions (mean, sum, sqrt, ...) for this array: numpy, torch or jax.numpy."""
    framework = framework_of(array)
    return np if framework == "numpy" else sys.modules["torch" if framework == "torch" else "jax.numpy"]


def dtype_name(dtype: object, what: str = "a dtype") -> str:
    """Return the name of a dtype of any framework, or of a string; `what` says in an error where it was given.

    Raises:
        DtypeError: it is no dtype.

    Example:
        >>> import numpy as np
        >>> dtype_name(np.float32), dtype_name("bfloat16"), dtype_name(np.dtype("float16"))
        ('float32', 'bfloat16', 'float16')
    """
    if isinstance(dtype, str):
        return dtype
    text = str(dtype)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    try:
        return np.dtype(dtype).name  # type: ignore[call-overload]
    except TypeError as error:
        raise DtypeError(f"{what} must be a dtype, or the name of one of {', '.join(FLOAT_DTYPES)}; got {dtype!r}") from error


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name; bfloat16 is ml_dtypes' own."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def cast(array: Array, name: str) -> Array:
    """Convert an array to the dtype of that name, rounding to nearest even; the same array if it has it already."""
    if framework_of(array) == "torch":
        return array.to(getattr(sys.modules["torch"], name))
    return array.astype(numpy_dtype(name), copy=False) if isinstance(array, np.ndarray) else array.astype(name)


def rsqrt(array: Array) -> Array:
    """Return 1 / sqrt(array). On the CPU torch's square root, and XLA's rsqrt, may be off by a unit in the last place."""
    xp = namespace(array)
    return xp.rsqrt(array) if framework_of(array) == "torch" else 1 / xp.sqrt(array)


def rounded(array: Array, name: str) -> Array:
    """Round the values to the dtype of that name and keep the array's own dtype.

    XLA is free to drop a conversion to a narrower type and back, so on JAX the rounding is asked for explicitly.
    """
    own = dtype_name(array.dtype)
    if name == own:
        return array
    if framework_of(array) != "jax":
        return cast(cast(array, name), own)
    lax = sys.modules["jax"].lax
    if name == "bfloat16":
        return lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    # reduce_precision flushes subnormals, which float16 has in everyday range
    return cast(lax.optimization_barrier(cast(array, name)), own)
