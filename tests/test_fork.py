# SPDX-License-Identifier: Apache-2.0
"""A process that is forked from one whose threads have computed has none of these, and computes all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)
if not hasattr(os, "register_at_fork"):
    pytest.skip("there is no fork here", allow_module_level=True)

CODE = """
import os, signal, torch, normkit_torch
torch.set_num_threads(2)
x, weight = torch.randn(512, 1024), torch.randn(1024)
call = lambda: normkit_torch.rms_norm(x, weight)
for _ in range({times}):
    expected = call()
(x + 1).sum()  # so that torch's threads are there in any case
child = os.fork()
if not child:
    signal.alarm(30)  # which ends it where it waits for ever
    os._exit(0 if all((call().numpy() == expected.numpy()).all() for _ in range(3)) else 1)
_, status = os.waitpid(child, 0)
print("status", status, torch.equal(call(), expected))
"""


@pytest.mark.parametrize("times", [1, 2], ids=["cold", "prepared"])
def test_a_child_computes(times: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(times=times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "status 0 True"
