# SPDX-License-Identifier: Apache-2.0
"""The GPU architecture that kernels are compiled for: the device's, or one named to compile for a machine that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib.util import find_spec

import jax

from normkit.errors import MissingPackageError, OptionError, UnsupportedError

from . import device

_PREFIXES = {"cuda": "sm_", "rocm": "gfx"}
_named = jax.make_user_context(default_value=())


def target(*architectures: str) -> AbstractContextManager[None]:
    """Compile kernels for these architectures inside `with target(...):`, on any machine; JAX traces again for each target.

    For `jax.export`, ahead-of-time compilation and tests. One architecture for each GPU platform that is compiled for:
    `target("sm_90")`, or `target("sm_90", "gfx942")` to export for ("cuda", "rocm"). Where devices of a platform are there,
    theirs is the only one.

    `jax.export` gives no guarantee for programs with custom calls, such as these kernels, and asks for a word that this is
    known: `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]`.

    Args:
        *architectures: such as "sm_90" (NVIDIA) or "gfx942" (AMD).

    Raises:
        OptionError: an architecture is of neither kind, or there are two of one kind.
        MissingPackageError: triton, which compiles the kernels, is not installed.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import normkit_jax
        >>> x = jax.ShapeDtypeStruct((4, 64), jnp.float32)
        >>> with target("sm_90"):
        ...     lowered = jax.jit(normkit_jax.rms_norm).trace(x).lower(lowering_platforms=("cuda",))
    """
    platforms = [platform for name in architectures for platform, prefix in _PREFIXES.items() if name.startswith(prefix)]
    if len(set(platforms)) < len(architectures):
        raise OptionError(f"target takes one architecture like sm_90 and one like gfx942 at most, got {list(architectures)}")
    if find_spec("triton") is None:
        asked = ", ".join(map(repr, architectures))
        raise MissingPackageError(f"target({asked}) compiles kernels, which needs the package triton: pip install triton")
    return _named(architectures)


def expected() -> bool:
    """Whether a program may come to have kernels: there is a GPU, or a target is named."""
    return bool(_named.value) or jax.default_backend() == "gpu"


def arch_of(platform: str, devices: Iterable[jax.Device]) -> str | None:
    """Return the architecture to compile for: that of the devices, or the target named; None on a platform without one.

    Args:
        platform: that a program is lowered for.
        devices: that it is lowered for.

    Raises:
        UnsupportedError: there is no device of the platform, and no target is named.
        OptionError: none of the targets named is of the platform, or that one is not the devices'.
    """
    if platform not in _PREFIXES:
        return None
    named: tuple[str, ...] = _named.value
    fitting = next((name for name in named if name.startswith(_PREFIXES[platform])), None)
    found = device.arch_of(platform, devices)
    if named and fitting is None:
        raise OptionError(f"target {', '.join(map(repr, named))} is not an architecture of {platform}")
    if fitting and found and fitting != found:
        raise OptionError(f"target {fitting!r} was named, and the {platform} devices to compile for are {found}")
    if not fitting and not found:
        raise UnsupportedError(
            f"compiling for {platform} needs its architecture, and there is no {platform} device here: "
            f"name one, as in normkit_jax.target({'sm_90' if platform == 'cuda' else 'gfx942'!r})"
        )
    return fitting or found
