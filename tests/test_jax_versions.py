# SPDX-License-Identifier: Apache-2.0
"""The JAX tests with other versions of JAX and Triton, each in an environment of its own with XLA's compiler for NVIDIA GPUs.

The environments are made once and kept in the user's cache folder, in `normkit/jax` (NORMKIT_TEST_CACHE names another one).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .jax_gpu.process import ROOT, pytest_in_a_process

CACHE = Path(os.environ.get("NORMKIT_TEST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normkit/jax")
# The oldest JAX that is supported on Python 3.11, and newer ones, which need Python 3.12.
ENVIRONMENTS = {
    "jax-0.10.2": ("3.11", "0.10.2", "3.9.0"),
    "jax-0.11.2": ("3.12", "0.11.2", "3.6.0"),
    "jax-0.12.0.1": ("3.12", "0.12.0.1", "3.9.0"),
}
FILES = [f"tests/test_jax_{name}.py" for name in ("message", "lowering", "target", "device_less", "transforms")]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") == "1",
    reason="runs once, and Triton and XLA for CUDA are there for Linux only",
)


def works(command: str) -> bool:
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


@pytest.fixture(scope="module", params=list(ENVIRONMENTS))
def python(request: pytest.FixtureRequest) -> str:
    """The Python of an environment, which is made where it is not there yet."""
    version, jax, triton = ENVIRONMENTS[request.param]
    script, directory = ROOT / "tests/jax_gpu/make_env.sh", CACHE / f"python-{version}-jax-{jax}-triton-{triton}"
    command = ["bash", str(script), python_of(version), jax, triton, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}"
    return str(directory / "bin/python")


def test_launches(python: str) -> None:
    """Nothing is skipped there for want of the plugin or the compiler."""
    files = [name for name in FILES if (ROOT / name).exists()]
    assert "not installed" not in pytest_in_a_process(*files, python=python)


def test_numerics(python: str) -> None:
    pytest_in_a_process("tests/test_functional.py", "-k", "jax-reference and backward", python=python)


def test_the_reference_on_eight_devices(python: str) -> None:
    pytest_in_a_process("tests/jax_devices", python=python, devices=8)


def test_the_kernels_on_eight_devices(python: str) -> None:
    pytest_in_a_process("tests/jax_devices", python=python, devices=8, interpret=True)
