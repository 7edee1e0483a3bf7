# SPDX-License-Identifier: Apache-2.0
"""Tests in a process of their own, for what is set once for a whole process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def pytest_in_a_process(
    *arguments: str, python: str = sys.executable, devices: int = 1, interpret: bool = False, timeout: float = 600
) -> str:
    """Run pytest on the CPU and return what it printed.

    Args:
        *arguments: what to run.
        python: the interpreter, of this environment or another one.
        devices: how many devices JAX sees.
        interpret: whether Triton interprets its kernels.
        timeout: seconds.

    Raises:
        AssertionError: a test failed, or none ran; with the end of what was printed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    output = done.stdout + done.stderr
    tail = "\n".join(output.splitlines()[-40:])
    assert done.returncode == 0, tail
    assert re.search(r"\b[1-9]\d* passed", output), f"no test ran\n{tail}"
    return tail
