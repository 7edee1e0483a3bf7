# SPDX-License-Identifier: Apache-2.0
"""Memory that is short for a moment is an error of that call, as in torch, and says nothing of those that follow."""

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

from normkit_torch import failures, jit, launch, launch_backward

from .launch_calls import CALLS, EACH

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
