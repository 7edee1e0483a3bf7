# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver for Triton that compiles for sm_90 and launches nothing: Triton's own launch path runs on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

# Triton keeps compiled kernels by device; these are nobody's, so that nothing stays behind for a real driver.
DEVICE, OTHER_DEVICE = -1, -2


class FakeLaunch(NamedTuple):
    """What a driver would have been told."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    metadata: Any
    device: int
    stream: int


class FakeDriver:
    """What a driver's state would be.

    Attributes:
        launches: what was launched.
        device: the current device.
        streams: the current stream of each device.
        tensors_on: the device that CPU tensors are said to be on.
        loaded: the devices that kernels were loaded on, in order.
        fail: is called before "driver" is asked for, and before each "load" and "launch", with that word, and may raise.
    """

    def __init__(self) -> None:
        self.launches: list[FakeLaunch] = []
        self.device = self.tensors_on = DEVICE
        self.streams = {DEVICE: 0, OTHER_DEVICE: 0}
        self.loaded: list[int] = []
        self.fail: Callable[[str], None] = lambda _: None

    def move(self, device: int) -> None:
        """Say that CPU tensors are on another device, and set aside what is known of the one before: they look the same."""
        from normkit_torch import launch, launch_backward, prepared, steps

        self.tensors_on = device
        prepared.forget()
        for known in (steps._kernels, launch._forwards, launch_backward._backwards):
            known.clear()

    @contextmanager
    def current(self, _: Any) -> Iterator[None]:
        """Make the device that CPU tensors are said to be on the current one, as `torch.cuda.device` does."""
        before, self.device = self.device, self.tensors_on
        try:
            yield
        finally:
            self.device = before

    def lookups(self, _: Any) -> tuple[int, Callable[[], int], Callable[[int], int]]:
        """Do what that of `normkit_torch.device` does."""
        from triton.runtime.driver import driver

        self.fail("driver")
        return self.tensors_on, driver.active.get_current_device, driver.active.get_current_stream


@contextmanager
def fake_driver(record: bool = True) -> Iterator[FakeDriver]:
    """Make CPU tensors' launches go to a fake driver, and say that they are on cuda.

    Args:
        record: whether launches are recorded, which takes its time.
    """
    from triton.runtime.driver import driver

    fake = FakeDriver()
    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", _driver(fake, record)))
        stack.callback(_forget)
        _say_that_tensors_are_there(stack, fake)
        yield fake


def _driver(fake: FakeDriver, record: bool) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.function, self.metadata = source.fn, metadata

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            assert function is not None
            if record:
                about, enter, leave, *given = rest
                if enter is not None:
                    enter(about)
                fake.fail("launch")
                arguments = dict(zip(self.function.arg_names, given, strict=True))
                launch = FakeLaunch(self.function.__name__, (x, y, z), arguments, self.metadata, fake.device, stream)
                fake.launches.append(launch)
                if leave is not None:
                    leave(about)

    class Utilities:
        def load_binary(self, *arguments: Any) -> tuple[int, ...]:
            fake.fail("load")
            fake.loaded.append(arguments[-1])
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
            return fake.device

        def get_current_stream(self, device: int) -> int:
            return fake.streams[device]

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    return Driver()


def _say_that_tensors_are_there(stack: ExitStack, fake: FakeDriver) -> None:
    """Replace what asks for real devices, and set aside what is kept from call to call."""
    from normkit_torch import device, failures, launch, launch_backward, prepared, steps

    for module, name, value in (
        (device, "platform_of", lambda _: ("cuda", "sm_90")),
        (device, "lookups", fake.lookups),
        (device, "current", fake.current),
        (steps, "_kernels", {}),
        (launch, "_forwards", {}),
        (launch_backward, "_backwards", {}),
        (failures._failures, "_reasons", {}),
        (prepared, "_calls", {}),
        (prepared, "_latest", {}),
    ):
        stack.enter_context(patch.object(module, name, value))


def compiled(device: int = DEVICE) -> dict[str, list[Any]]:
    """Return what was compiled for the fake driver, by kernel and in order."""
    from normkit import kernels

    functions = {name: getattr(kernels, name) for name in kernels.__all__}
    return {
        name: list(function.device_caches[device][0].values())
        for name, function in functions.items()
        if device in function.device_caches
    }


def _forget() -> None:
    """Drop every kernel, while there is a driver that can unload it."""
    from normkit import kernels

    for device in (DEVICE, OTHER_DEVICE):
        for name, found in compiled(device).items():
            for kernel in found:
                kernel.module = None
            del getattr(kernels, name).device_caches[device]
