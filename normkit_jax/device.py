# SPDX-License-Identifier: Apache-2.0
"""What a JAX device is: the one place that detects the platform."""

from __future__ import annotations

import jax

from normkit.arrays import Array


def platform_of(array: Array) -> str:
    """Return the platform ("cuda", "rocm", "cpu", "tpu", ...) that an array is on, for a traced one JAX's default.

    Example:
        >>> import jax.numpy as jnp
        >>> platform_of(jnp.ones(3)) == jax.default_backend()
        True
    """
    device = jax.devices()[0] if isinstance(array, jax.core.Tracer) else next(iter(array.devices()))
    if device.platform != "gpu":
        return str(device.platform)
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
