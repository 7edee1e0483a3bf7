# SPDX-License-Identifier: Apache-2.0
"""An implementation for torch that autograd cannot look into, as a kernel is: what the front end forgets is then lost."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit import reference
from normkit.registry import Implementation
from normkit_torch import implementations

NAME = "opaque"


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it first in the table until the test ends."""
    module: Any = ModuleType("normkit_opaque_implementation")
    module.supports, module.forward, module.backward, module.forward_ = (
        reference.supports,
        _forward,
        _backward,
        _forward_in_place,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    table = (Implementation(NAME, module.__name__), *implementations.TABLE)
    for user in [module for name, module in sys.modules.items() if name.startswith("normkit_torch.")]:
        if hasattr(user, "TABLE"):
            monkeypatch.setattr(user, "TABLE", table)


def _bare(value: Any) -> Any:
    """The numbers of a tensor, without history or tangent."""
    return forward_ad.unpack_dual(value).primal.detach() if isinstance(value, Tensor) else value


def _forward(problem: Any, *tensors: Tensor | None) -> Any:
    with torch.no_grad():
        result = reference.forward(problem, *map(_bare, tensors))
    # a kernel computes statistics only where a backward may follow
    return result if problem.needs_grad else result._replace(mean=None, rstd=None)


def _backward(problem: Any, wanted: Any, *tensors: Tensor | None) -> Any:
    *_, rstd = tensors
    assert rstd is not None and rstd.numel() == problem.rows, "the forward must have been told that a backward follows"
    with torch.no_grad():
        return reference.backward(problem, wanted, *map(_bare, tensors))


def _forward_in_place(problem: Any, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    y, residual_out, _, _ = _forward(problem, x, residual, weight, bias)
    # .data is what torch does not count as a change
    x.data.copy_(y)
    residual.data.copy_(residual_out)
