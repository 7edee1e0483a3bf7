# SPDX-License-Identifier: Apache-2.0
"""Backward passes, for tests of what reaches the driver, and what forbids the long way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import normkit_torch
from normkit import plan, registry
from normkit_torch import dispatch, launch_backward

from .fake_driver import FakeDriver, FakeLaunch
from .launch_calls import BF16, HIDDEN, parameter, rows

LONG = 20000
NAMES = ("x", "residual", "weight", "bias")
F32 = torch.float32


class Pass:
    """A backward pass of add_layer_norm: its tensors, alive as long as this is, its gradients, and what was launched."""

    def __init__(
        self,
        driver: FakeDriver,
        count: int = 8,
        hidden: int = HIDDEN,
        asks: tuple[str, ...] = NAMES,
        dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
        change: Callable[[Tensor], Tensor] = lambda dy: dy,
        pack: Callable[[Tensor], Tensor] = lambda saved: saved,
    ) -> None:
        x, residual = (rows(count, hidden=hidden, dtype=dtype) for dtype in dtypes)
        given = [x, residual, parameter(hidden), parameter(hidden)]
        self.leaves = [tensor.requires_grad_(name in asks) for name, tensor in zip(NAMES, given, strict=True)]
        self.saved: list[Tensor] = []

        def unpack(saved: Tensor) -> Tensor:
            self.saved.append(saved)
            return saved

        with saved_tensors_hooks(pack, unpack):
            self.results: tuple[Tensor, Tensor] = normkit_torch.add_layer_norm(*self.leaves)
        self.dy, self.dresidual_out = change(rows(count, hidden=hidden)), rows(count, hidden=hidden, dtype=dtypes[1])
        before = len(driver.launches)
        asked = [leaf for leaf in self.leaves if leaf.requires_grad]
        given_back = list(zip(self.results, (self.dy, self.dresidual_out), strict=True))
        if not self.results[1].requires_grad:  # neither x nor the residual asks
            del given_back[1]
        self.gradients = torch.autograd.grad([result for result, _ in given_back], asked, [dt for _, dt in given_back])
        self.launches = driver.launches[before:]

    def assert_told(self) -> None:
        """The kernels were told of these tensors, and of sums that the next ones look at."""
        h, weight, mean, rstd = self.saved
        own = {"dy": self.dy, "dresidual_out": self.dresidual_out, "h": h, "weight": weight, "mean": mean, "rstd": rstd}
        *steps, dweight, dbias = (one.arguments for one in self.launches)
        for step in steps:
            told = {name: tensor.data_ptr() for name, tensor in own.items() if f"{name}_ptr" in step}
            assert {name: step[f"{name}_ptr"] for name in told} == told
            assert step["rows"] == len(self.dy)
        assert steps[-1]["dx_ptr"] == self.gradients[0].data_ptr() == self.gradients[1].data_ptr()
        for total, name, gradient in zip((dweight, dbias), ("dweight", "dbias"), self.gradients[2:], strict=True):
            assert total["partial_ptr"] == steps[0][f"{name}_ptr"] and total["total_ptr"] == gradient.data_ptr()
            assert gradient.shape == (h.shape[-1],) and gradient.dtype == BF16
        if len(steps) > 1:
            assert [steps[0][f"{name}_ptr"] for name in ("x_hat_g", "g")] == [
                steps[1][f"{name}_ptr"] for name in ("x_hat_g", "g")
            ]


def shapes(launches: list[FakeLaunch]) -> list[Any]:
    """What does not depend on addresses."""
    return [
        (one.kernel, one.grid, one.metadata.hash, {n: v for n, v in one.arguments.items() if not n.endswith("_ptr")})
        for one in launches
    ]


@contextmanager
def only_the_short_way() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the long way")

    ways = ((dispatch, "backward"), (registry, "select"), (plan, "backward_plan"), (launch_backward, "_ready"))
    with pytest.MonkeyPatch.context() as patched:
        for module, name in ways:
            patched.setattr(module, name, refuse)
        yield
