# SPDX-License-Identifier: Apache-2.0
"""The JAX tests with other versions of JAX and Triton, each in an environment of its own with XLA's compiler for NVIDIA GPUs.

The environments are made once and kept in the user's cache folder, in `normkit/jax` (NORMKIT_TEST_CACHE names another one).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from .conftest import Ledger
from .process import ROOT, cache_folder, pytest_in_a_process, python_of

# The oldest JAX that is supported on Python 3.11, and newer ones, which need Python 3.12.
ENVIRONMENTS = {
    "jax-0.10.2": ("3.11", "0.10.2", "3.9.0"),
    "jax-0.11.2": ("3.12", "0.11.2", "3.6.0"),
    "jax-0.12.0.1": ("3.12", "0.12.0.1", "3.9.0"),
}
NAMES = ("message", "lowering", "launch_failure", "target", "device_less", "transforms", "gradient")
FILES = [f"tests/test_jax_{name}.py" for name in NAMES]
RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "launches": ([name for name in FILES if (ROOT / name).exists()], {}),
    "numerics": (["tests/test_functional.py", "-k", "jax-reference and backward"], {}),
    "reference on eight devices": (["tests/jax_devices"], {"devices": 8}),
    "cpu kernels": (["tests/test_jax_cpu.py"], {}),
    "cpu kernels on eight devices": (["tests/jax_devices"], {"devices": 8, "implementation": "cpu"}),
    "triton kernels on eight devices": (["tests/jax_devices"], {"devices": 8, "interpret": True}),
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") == "1",
    reason="runs once, and Triton and XLA for CUDA are there for Linux only",
)


@pytest.fixture(scope="module", params=list(ENVIRONMENTS))
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """What each process of an environment prints; the environment is made where it is not there yet."""
    version, jax, triton = ENVIRONMENTS[request.param]
    script, directory = ROOT / "tests/jax_gpu/make_env.sh", cache_folder() / f"jax/python-{version}-jax-{jax}-triton-{triton}"
    command = ["bash", str(script), python_of(version), jax, triton, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}"
    python = str(directory / "bin/python")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(partial(pytest_in_a_process, *run, python=python, **how)) for name, (run, how) in RUNS.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", RUNS)
def test_with_another_version(name: str, runs: dict[str, Future[str]], ledger: Ledger, request: pytest.FixtureRequest) -> None:
    output = runs[name].result()
    # nothing is skipped there for want of what the environment is made for
    assert not re.search(r"SKIPPED.*(plugin|cuda|triton|flatbuffers).*not installed", output), output
    ledger.elsewhere(request.node.callspec.id, "\n".join(output.strip().splitlines()[-8:]))
