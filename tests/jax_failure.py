# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels as the first choice on the CPU, as if it were an sm_90, to see what follows where they do not compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def kernels_on_the_cpu() -> Iterator[None]:
    """Let the `triton` implementation be chosen on the CPU, and after it the reference."""
    from normkit_jax import dispatch, implementations, launch, primitive

    table = tuple(entry for entry in implementations.TABLE if entry.name in ("triton", "reference"))
    table = tuple(type(entry)(entry.name, entry.module) for entry in table)
    with (
        patch.object(dispatch, "TABLE", table),
        patch.object(primitive, "TABLE", table),
        patch.object(primitive, "arch_of", lambda *_: "sm_90"),
        patch.object(launch, "_PLATFORMS", ("cpu",)),
    ):
        yield
