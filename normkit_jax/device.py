# SPDX-License-Identifier: Apache-2.0
"""What a JAX device is: the one place that detects platform and architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from normkit.arrays import Array

PLATFORMS = {"oneapi": "xpu"}
"""What normkit calls those of JAX's platforms that have another name there."""


def platform_of(array: Array) -> str:
    """Return the platform ("cuda", "rocm", "cpu", "tpu", ...) that an array is on, for a traced one JAX's default.

    Example:
        >>> import jax.numpy as jnp
        >>> platform_of(jnp.ones(3)) == jax.default_backend()
        True
    """
    return _platform(next(iter(devices_of(array))))


def devices_of(array: Array) -> Iterable[jax.Device]:
    """Return the devices that an array is on, for a traced one JAX's default."""
    return jax.devices() if isinstance(array, jax.core.Tracer) else array.devices()


def lowered_for(context: Any) -> tuple[jax.Device, ...]:
    """Return the devices that a program is lowered for, JAX's default ones where none are named.

    Args:
        context: what JAX gives to a lowering rule. That it holds the devices is not documented.
    """
    axes = context.module_context.axis_context
    mesh = getattr(axes, "mesh", None)
    if isinstance(mesh, jax.sharding.Mesh):
        return tuple(mesh.devices.flat)
    return getattr(axes, "device_assignment", None) or tuple(jax.devices())


def arch_of(platform: str, devices: Iterable[jax.Device]) -> str | None:
    """Return the architecture ("sm_90", "gfx942") of the first of these devices that is of a platform, None if none is.

    Example:
        >>> arch_of("cuda", jax.devices("cpu")) is None
        True
    """
    device = next((device for device in devices if _platform(device) == platform), None)
    if device is None or platform not in ("cuda", "rocm"):
        return None
    capability = str(device.compute_capability)
    return f"sm_{capability.replace('.', '')}" if platform == "cuda" else capability.split(":")[0]


def _platform(device: jax.Device) -> str:
    if device.platform != "gpu":
        return PLATFORMS.get(device.platform, str(device.platform))
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
