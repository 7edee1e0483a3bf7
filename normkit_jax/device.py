# SPDX-License-Identifier: Apache-2.0
"""What a JAX device is: the one place that detects platform and architecture."""

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
    return _platform(device)


def arch_of(platform: str) -> str | None:
    """Return the architecture ("sm_90", "gfx942") of the first device that JAX uses on a platform, None if it uses none.

    Example:
        >>> arch_of("cpu") is None
        True
    """
    device = jax.devices()[0]
    if platform not in ("cuda", "rocm") or _platform(device) != platform:
        return None
    capability = str(device.compute_capability)
    return f"sm_{capability.replace('.', '')}" if platform == "cuda" else capability.split(":")[0]


def _platform(device: jax.Device) -> str:
    if device.platform != "gpu":
        return str(device.platform)
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
