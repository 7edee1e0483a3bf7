# SPDX-License-Identifier: Apache-2.0
"""Tests that need a process of their own: the Triton interpreter is on or off for the whole of a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from .conftest import Ledger

ROOT = Path(__file__).parents[1]
INTERPRETED = {
    "every case": ("tests/test_functional.py", "-k", "torch-triton"),
    "every case, inside jax.jit": ("tests/test_functional.py", "-k", "jax-triton"),
    "memory, strides, rows, properties": ("tests/triton_interpreter",),
    "arrays to write to": ("tests/test_out.py", "-k", "torch and not reference"),
}

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets already", allow_module_level=True)
if not find_spec("torch") or not find_spec("triton"):
    pytest.skip("torch or triton is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The processes of the selected tests, all started at once; the interpreter runs on the CPU, also beside a GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    selected = [item.callspec.params["name"] for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    command = (sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    started = {
        name: subprocess.Popen(
            (*command, *INTERPRETED[name]),
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name in selected
    }
    yield started
    for process in started.values():
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str, processes: dict[str, subprocess.Popen[str]], ledger: Ledger) -> None:
    output, _ = processes[name].communicate()
    assert processes[name].returncode == 0, output
    summary = output[output.rfind("= implementations =") :] if "= implementations =" in output else output
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 0, output
    ledger.elsewhere(f"TRITON_INTERPRET=1: {name}", "\n".join(summary.strip().splitlines()[-8:]))
