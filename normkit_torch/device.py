# SPDX-License-Identifier: Apache-2.0
"""What a torch device is: the one place that detects platform and architecture, and asks for what is current."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


@cache
def platform_of(device: torch.device) -> tuple[str, str | None]:
    """Return platform ("cuda", "rocm", "xpu", "cpu", ...) and architecture ("sm_90", "gfx942"; None elsewhere) of a device.

    Example:
        >>> platform_of(torch.device("cpu"))
        ('cpu', None)
    """
    if device.type != "cuda":
        return device.type, None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "rocm", properties.gcnArchName.split(":")[0]
    return "cuda", f"sm_{properties.major}{properties.minor}"


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one for a launch, whose stream is then that device's."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()


def lookups(device: torch.device) -> tuple[int, Callable[[], int], Callable[[int], int]]:
    """Return a device's number, what returns the number of the current device, and what the current stream of one.

    They are those of Triton's driver, which asks torch.

    Raises:
        RuntimeError: Triton has no driver here.
    """
    from triton.runtime.driver import driver

    return device.index, driver.active.get_current_device, driver.active.get_current_stream
