# SPDX-License-Identifier: Apache-2.0
"""What of Triton's own launch is private and relied on, and what is left to Triton: hooks, and kernels of another kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from .fake_driver import DEVICE, FakeDriver, FakeLaunch, compiled

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing while it interprets", allow_module_level=True)

from triton import JITFunction, knobs

from normkit_torch import jit

from .launch_calls import EACH, in_place


def test_private_parts_of_triton_are_as_known(driver: FakeDriver) -> None:
    """Where they are not, each launch goes through Triton's own, which takes longer; nothing else changes."""
    assert jit._starts_as_known()
    in_place()
    (kernel,) = compiled()["forward_rows"]
    assert callable(kernel.run) and kernel.function == 2 and kernel.packed_metadata
    from normkit import kernels

    assert "rows" in kernels.forward_rows.do_not_specialize


@EACH
def test_the_driver_is_told_what_triton_would_tell_it(
    call: Callable[[], None], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels are the same objects, and all arguments but new memory are."""
    told = []
    original = JITFunction.run
    for known in (True, False, True):
        driver.move(DEVICE)
        jit_launches: list[bool] = []

        def noting(self: Any, *arguments: Any, seen: list[bool] = jit_launches, **options: Any) -> Any:
            seen.append(not options["warmup"])
            return original(self, *arguments, **options)

        driver.launches.clear()
        with monkeypatch.context() as patched:
            patched.setattr(jit, "_starts_as_known", lambda known=known: known)
            patched.setattr(JITFunction, "run", noting)
            call()
            call()
        assert any(jit_launches) is not known
        told.append([_comparable(one) for one in driver.launches])
    assert told[0] == told[1] == told[2]


def _comparable(launch: FakeLaunch) -> Any:
    arguments = {}
    for name, value in launch.arguments.items():
        address = getattr(value, "address", value)
        arguments[name] = (address is not None and address % 16) if name.endswith("_ptr") else value
    return launch._replace(arguments=arguments)


@pytest.mark.parametrize("chain", [True, False])
@EACH
def test_launch_hooks_of_triton_are_called(
    call: Callable[[], None], chain: bool, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def enter(about: Any) -> None:
        seen.append(about.get()["name"])

    def leave(_: Any) -> None:
        seen.append(len(driver.launches))

    for hooked in (False, True, True, False):
        if chain:
            (knobs.runtime.launch_enter_hook.add if hooked else knobs.runtime.launch_enter_hook.remove)(enter)
            (knobs.runtime.launch_exit_hook.add if hooked else knobs.runtime.launch_exit_hook.remove)(leave)
        else:
            with monkeypatch.context() as patched:
                if hooked:
                    patched.setattr(knobs.runtime, "launch_enter_hook", enter)
                    patched.setattr(knobs.runtime, "launch_exit_hook", leave)
                _assert_hooked(call, hooked, driver, seen)
            continue
        _assert_hooked(call, hooked, driver, seen)


def _assert_hooked(call: Callable[[], None], hooked: bool, driver: FakeDriver, seen: list[Any]) -> None:
    seen.clear()
    driver.launches.clear()
    call()
    expected = [about for number, launch in enumerate(driver.launches, 1) for about in (launch.kernel, number)]
    assert seen == (expected if hooked else [])


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.filterwarnings("error")
def test_what_a_hook_raises_is_no_failure_of_the_launch(
    which: str, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("the hook's own")

    in_place()
    monkeypatch.setattr(knobs.runtime, which, refuse)
    for _ in range(2):
        driver.launches.clear()
        with pytest.raises(RuntimeError, match="the hook's own"):
            in_place()
        assert len(driver.launches) == (which == "launch_exit_hook")


@pytest.mark.parametrize("made", [None, object()])
def test_what_triton_compiles_to_something_else_is_for_triton_to_launch(
    made: object, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache hook of Triton's may compile elsewhere, and another version may return another thing."""
    monkeypatch.setattr(JITFunction, "warmup", lambda *_, **__: made)
    for _ in range(2):
        in_place()
    assert len(driver.launches) == 2


def test_another_way_to_start_a_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.compiler import CompiledKernel

    def renamed(self: Any, grid: Any) -> Any:
        return lambda *given, stream: self.start(grid, stream, given)

    def reordered(self: Any, grid: Any) -> Any:
        return lambda *given, stream: self.run(*grid, self.function, stream, self.packed_metadata, None, None, None, *given)

    for other in (renamed, reordered, lambda self, grid: lambda *_: None):
        monkeypatch.setattr(CompiledKernel, "__getitem__", other)
        assert not jit._starts_as_known.__wrapped__()
