# SPDX-License-Identifier: Apache-2.0
"""What docs/torch.md says of torch's older tracers, and of processes that load data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from normkit import DtypeError

from .frameworks import installed
from .process import ROOT

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from normkit_torch import FastRMSNorm, add_rms_norm

# torch.jit is deprecated by torch itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = FastRMSNorm(rows(8))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x, x)[0]
        return normed


@pytest.mark.parametrize("trace", [torch.jit.trace, lambda block, example: make_fx(block)(*example)], ids=["jit", "make_fx"])
def test_traced_without_gradients_other_rows_may_be_given(trace: Callable[..., Any]) -> None:
    block = Block()
    with torch.no_grad():
        traced = trace(block, (rows(3, 8),))
        assert torch.equal(traced(rows(5, 8, seed=1)), block(rows(5, 8, seed=1)))


def test_jit_trace_takes_a_weight_that_requires_a_gradient_for_a_difference() -> None:
    with pytest.raises(torch.jit._trace.TracingCheckError, match="Graphs differed across invocations"):
        torch.jit.trace(Block(), (rows(3, 8),))


def test_jit_script_refuses_the_functions() -> None:
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(add_rms_norm)


def test_symbolic_trace_gives_what_is_no_tensor() -> None:
    with pytest.raises(DtypeError, match=r"x must be a torch\.Tensor, got torch\.fx\.proxy\.Proxy"):
        torch.fx.symbolic_trace(Block())


WORKERS = """
import torch, normkit_torch
class Normed(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return normkit_torch.rms_norm(torch.randn(64, 512, generator=torch.Generator().manual_seed(index)))
data = Normed()
expected = [data[index] for index in range(4)]  # so that this process has threads of its own when it forks
found = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=60))
assert all(map(torch.equal, found, expected)) and len(found) == 4
"""


def test_processes_that_load_data_compute_too() -> None:
    """In a process without JAX, which warns of every fork."""
    done = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
