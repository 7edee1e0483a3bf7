# SPDX-License-Identifier: Apache-2.0
"""From JAX arrays to an implementation and back."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from normkit import registry
from normkit.arrays import FLOAT_DTYPES, Array, dtype_name, not_an_array
from normkit.call import Call
from normkit.errors import DeviceError, DtypeError, OptionError
from normkit.interface import Kernels
from normkit.spec import Operand, Problem

from . import device
from .implementations import TABLE


class HasJaxArray(Protocol):
    """What says by itself which JAX array it is, as flax.nnx.Param does."""

    def __jax_array__(self) -> jax.Array:
        """Return the array."""


ArrayLike = jax.Array | np.ndarray[Any, Any] | HasJaxArray
"""What is taken for an array. Not scalars, unlike jax.typing.ArrayLike: they have no rows."""


def as_jax(call: Call) -> Call:
    """Return the call with JAX arrays, after checking what only JAX knows: x64 and committed devices."""
    call = call.with_arrays(_as_array)
    for name, dtype in call.dtypes().items():
        if dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise DtypeError(f"{name}='float64' is what JAX has only after jax.config.update('jax_enable_x64', True)")
    for name in ("eps", "weight_offset"):
        value = getattr(call, name)
        if isinstance(value, jax.Array):
            known = f"give float({name})"
            traced = f"bind it with functools.partial, or name it in jax.jit(..., static_argnames={name!r})"
            raise OptionError(
                f"{name} must be a Python number that is known while JAX traces, got {type(value).__name__}: "
                f"{traced if isinstance(value, jax.core.Tracer) else known}"
            )
    _check_devices(call.arrays)
    return call


def _as_array(name: str, given: Any) -> jax.Array:
    is_array = isinstance(given, jax.Array) or not hasattr(given, "__jax_array__")
    array = given if is_array else given.__jax_array__()
    if not isinstance(array, jax.Array | np.ndarray):
        raise not_an_array(name, array, "a JAX or NumPy array (jax.numpy.asarray makes one)")
    try:
        # what is differentiated may be NumPy's within; and float64 becomes float32 without x64, as under jit
        return jnp.asarray(array)
    except TypeError as error:
        raise DtypeError(f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {array.dtype}") from error


def varying_alike(call: Call) -> Call:
    """Under shard_map, let every array vary over the mesh axes that any of them varies over.

    To be undone for a gradient: where the array given was the same on several devices, its gradient is summed over them.
    """
    varying = {name: jax.typeof(array).manual_axis_type.varying for name, array in call.arrays.items()}
    union = frozenset[str]().union(*varying.values())

    def vary(name: str, array: Array) -> Array:
        missing = tuple(union - varying[name])
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return call.with_arrays(vary) if union else call


def _check_devices(arrays: dict[str, Any]) -> None:
    committed = {
        name: array.devices()
        for name, array in arrays.items()
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.committed
    }
    for name, devices in committed.items():
        first, expected = next(iter(committed.items()))
        if devices != expected:
            raise DeviceError(f"{name} is on {devices} and {first} on {expected}: move them with jax.device_put")


def operand(name: str, array: Array) -> Operand:
    """Describe an array; its device was checked before."""
    return Operand(array.shape, dtype_name(array.dtype))


def problem_of(call: Call, needs_grad: bool) -> Problem:
    """Validate a call and describe it."""
    return call.problem(operand, platform=device.platform_of(call.x), needs_grad=needs_grad)


def kernels_of(problem: Problem, implementation: str | None) -> Kernels:
    """Choose an implementation."""
    return registry.select(problem, TABLE, implementation).load()
