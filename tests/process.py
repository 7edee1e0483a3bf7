# SPDX-License-Identifier: Apache-2.0
"""Tests in a process of their own, for what is set once for a whole process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_in_a_process(
    *arguments: str,
    python: str = sys.executable,
    devices: int = 1,
    interpret: bool = False,
    implementation: str = "reference",
    variables: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> str:
    """Run pytest on the CPU and return what it printed.

    Args:
        *arguments: what to run.
        python: the interpreter, of this environment or another one.
        devices: how many devices JAX sees.
        interpret: whether Triton interprets its kernels, which tests/jax_devices then asks for.
        implementation: what tests/jax_devices asks for otherwise.
        variables: of the environment, more of them.
        timeout: seconds.

    Raises:
        AssertionError: a test failed, or none ran; with the end of what was printed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment["NORMKIT_TEST_IMPLEMENTATION"] = implementation
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    environment |= variables or {}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    output = done.stdout + done.stderr
    tail = "\n".join(output.splitlines()[-40:])
    assert done.returncode == 0, tail
    assert re.search(r"\b[1-9]\d* passed", output), f"no test ran\n{tail}"
    return tail


def cache_folder() -> Path:
    """Return the folder that environments are kept in."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NORMKIT_TEST_CACHE") or Path(cache) / "normkit")


def works(command: str) -> bool:
    """Whether a Python runs."""
    try:
        return subprocess.run([command, "-c", ""], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


def python_of(version: str) -> str:
    """Return a Python of a version: this one, one on the PATH, or one that pyenv has installed."""
    candidates = [sys.executable] if sys.version_info[:2] == tuple(map(int, version.split("."))) else []
    candidates += [found] if (found := shutil.which(f"python{version}")) else []
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates += sorted(map(str, pyenv.glob(f"versions/{version}*/bin/python")))
    usable = [candidate for candidate in candidates if works(candidate)]
    if not usable:
        pytest.skip(f"no Python {version} was found, on the PATH or in pyenv")
    return usable[0]
