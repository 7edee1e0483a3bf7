# SPDX-License-Identifier: Apache-2.0
"""The GPU architecture that kernels are compiled for: the device's, or one named to compile for a machine that is not there."""

from __future__ import annotations

import jax

from normkit.errors import OptionError, UnsupportedError

from . import device

target = jax.make_user_context(default_value=None)
"""Context manager: `with target("sm_90"):` compiles kernels for that architecture, on any machine.

For `jax.export`, ahead-of-time compilation and tests. JAX traces a function again for each target.
"""


def arch_of(platform: str) -> str:
    """Return the architecture to compile for on a platform: the target named, or that of the first device there.

    Raises:
        UnsupportedError: there is no device of the platform, and no target is named.
        OptionError: the target named is not one of the platform, or not that of the devices that are there.
    """
    named = target.value
    found = device.arch_of(platform)
    if named is None:
        if found is None:
            raise UnsupportedError(
                f"compiling for {platform} needs its architecture, and there is no {platform} device here: "
                f"name one, as in normkit_jax.target({'sm_90' if platform == 'cuda' else 'gfx942'!r})"
            )
        return found
    if not named.startswith("sm_" if platform == "cuda" else "gfx"):
        raise OptionError(f"target {named!r} is not an architecture of {platform}")
    if found not in (None, named):
        raise OptionError(f"target {named!r} was named, and the {platform} devices here are {found}")
    return named
