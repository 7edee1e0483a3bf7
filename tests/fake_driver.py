# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver for Triton that compiles for sm_90 and launches nothing: Triton's own launch path runs on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

# Triton keeps compiled kernels by device; this one is nobody's, so that nothing stays behind for a real driver.
DEVICE = -1


class FakeLaunch(NamedTuple):
    """What a driver would have been told."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    metadata: Any


@contextmanager
def fake_driver() -> Iterator[list[FakeLaunch]]:
    """Make CPU tensors' launches go to a fake driver, and say that they are on cuda; the launches are recorded."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    from normkit_torch import device

    launches: list[FakeLaunch] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.function, self.metadata = source.fn, metadata

        def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
            names = self.function.arg_names
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            launches.append(FakeLaunch(self.function.__name__, (x, y, z), arguments, self.metadata))

    class Utilities:
        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 2, 32, 0, 1024

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

        def unload_module(self, *_: Any) -> None: ...

    class Driver(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utilities(), Launcher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return DEVICE

        def get_current_stream(self, _: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    with patch.object(driver, "_active", Driver()), patch.object(device, "platform_of", lambda _: ("cuda", "sm_90")):
        try:
            yield launches
        finally:
            _forget()


def compiled() -> dict[str, list[Any]]:
    """Return what was compiled for the fake driver, by kernel and in order."""
    from normkit import kernels

    functions = {name: getattr(kernels, name) for name in kernels.__all__}
    return {
        name: list(function.device_caches[DEVICE][0].values())
        for name, function in functions.items()
        if DEVICE in function.device_caches
    }


def _forget() -> None:
    """Drop every kernel, while there is a driver that can unload it."""
    from normkit import kernels

    for name, found in compiled().items():
        for kernel in found:
            kernel.module = None
        del getattr(kernels, name).device_caches[DEVICE]
