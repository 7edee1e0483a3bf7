# SPDX-License-Identifier: Apache-2.0
"""Several processes with one cache of Triton's, started at once, and a process that forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing while it interprets", allow_module_level=True)

ROOT = Path(__file__).parent.parent

LAUNCH = """
import json, sys, warnings
import torch, normkit_torch
from tests.fake_driver import fake_driver
warnings.simplefilter("error", RuntimeWarning)
def launch():
    with fake_driver() as driver:
        for hidden in (64, 4096):
            leaves = [torch.ones(3, hidden, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
            y, _ = normkit_torch.add_rms_norm(*leaves, torch.ones(hidden, dtype=torch.bfloat16), implementation="triton")
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [(one.kernel, one.metadata.hash) for one in driver.launches]
"""

AT_ONCE = """
import triton
print("ready", flush=True)
sys.stdin.readline()
compilations = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: compilations.append(not cache_hit)
print(json.dumps([launch(), sum(compilations)]))
"""

FORKED = """
import os
torch.set_num_threads(1)  # torch's own threads do not outlive a fork
def compute():
    x = torch.arange(12.0).view(3, 4)
    for _ in range(2):
        results = normkit_torch.add_rms_norm(x, x), normkit_torch.add_rms_norm_(x.clone(), x.clone())
    return [tensor.tolist() for pair in results for tensor in pair]
before = compute(), launch()
child = os.fork()
if child == 0:
    os._exit(0 if (compute(), launch()) == before else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or (compute(), launch()) != before)
"""


def _started(program: str, cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", LAUNCH + program], env=environment, cwd=ROOT, text=True, **pipes)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started = [_started(AT_ONCE, tmp_path / "cache") for _ in range(4)]
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_processes_at_once_with_one_empty_cache(processes: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert not (tmp_path / "cache").exists()
    for process in processes[:-1]:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=300) for process in processes[:-1]]
    results = [json.loads(output or json.dumps(error)) for output, error in outputs]
    assert [process.returncode for process in processes[:-1]] == [0] * 3, outputs
    launches = [launched for launched, _ in results]
    assert launches[0] == launches[1] == launches[2] and len(launches[0]) == 4
    # each has some of what another compiled meanwhile, or compiles it too
    assert max(compiled for _, compiled in results) <= 4 <= sum(compiled for _, compiled in results)
    # the last one starts when all that it needs is there
    output, error = processes[-1].communicate("\n", timeout=300)
    assert processes[-1].returncode == 0, error
    assert json.loads(output) == [launches[0], 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_forks_after_it_has_computed_and_launched(tmp_path: Path) -> None:
    process = _started(FORKED, tmp_path / "cache")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
