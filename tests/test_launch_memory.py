# SPDX-License-Identifier: Apache-2.0
"""Memory that is short for a moment, or freed, is an error of that call, and says nothing of those that follow."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable

import pytest

from .fake_driver import FakeDriver

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing while it interprets", allow_module_level=True)

import torch

import normkit_torch
from normkit import OptionError
from normkit_torch import failures, jit, launch, launch_backward

from .launch_calls import CALLS, EACH, parameter, rows

ERRORS: dict[str, tuple[str, Exception]] = {
    "torch has none for a launch": ("launch", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "the driver has none for a launch": ("launch", RuntimeError("Triton Error [CUDA]: out of memory")),
    "the driver has none for a kernel": ("load", RuntimeError("Triton Error [CUDA]: out of memory")),
    "the host has none for a compiler": ("load", OSError(errno.ENOMEM, "Cannot allocate memory")),
}


@EACH
@pytest.mark.parametrize("name", ERRORS)
def test_it_is_raised_and_not_remembered(call: Callable[[], None], name: str, driver: FakeDriver) -> None:
    where, error = ERRORS[name]

    def fail(now: str) -> None:
        if now == where:
            raise error

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        driver.fail = fail
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match=r"(?i)memory"):
                call()
        assert not failures._failures._reasons and not driver.launches
        driver.fail = lambda _: None
        call()
        assert driver.launches


@pytest.mark.parametrize("call", [*CALLS[:3], *CALLS[4:]], ids=lambda call: call.__name__)
def test_a_prepared_call_stays_prepared(call: Callable[[], None], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    call()

    def short(_: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    driver.fail = short
    with pytest.raises(torch.OutOfMemoryError):
        call()
    driver.fail = lambda _: None
    monkeypatch.setattr(jit.Kernel, "_compile", None)
    monkeypatch.setattr(launch, "_launch_forward", None)
    monkeypatch.setattr(launch_backward, "_ready", None)
    call()


@pytest.mark.parametrize("times", [0, 1], ids=["cold", "prepared"])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("function", [normkit_torch.add_layer_norm, normkit_torch.add_layer_norm_])
def test_memory_that_was_freed(function: Callable[..., object], place: int, times: int, driver: FakeDriver) -> None:
    for _ in range(times):
        function(rows(8), rows(8), parameter(), parameter())
    tensors = [rows(8), rows(8), parameter(), parameter()]
    tensors[place] = tensors[place].clone()
    tensors[place].untyped_storage().resize_(0)
    driver.launches.clear()
    with pytest.raises(OptionError, match=f"^{('x', 'residual', 'weight', 'bias')[place]} has shape .* and no memory"):
        function(*tensors)
    assert not driver.launches and not failures._failures._reasons
