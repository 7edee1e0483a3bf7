# SPDX-License-Identifier: Apache-2.0
"""The vendors' implementations with the real packages, each in an environment of its own, made by tests/vendors/make_env.sh.

The environments are made once and kept in the user's cache folder, in `normkit/vendors` (NORMKIT_TEST_CACHE names another one).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

from .conftest import Ledger
from .process import ROOT, cache_folder, pytest_in_a_process, python_of

VENDORS = ("vllm", "ipex")
# The packages have these for Linux on x86-64 and, IPEX, for Python 3.11.
PYTHON = "3.11"
# IPEX has the oldest torch that normkit takes, whose Dynamo traces less than later ones.
OLDEST_TORCH = (
    "tests/test_torch_compile.py",
    "tests/test_prepared_torch.py",
    "-k",
    "aot_eager or train_compiled or in_place or export or after_preparation",
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or os.environ.get("TRITON_INTERPRET") == "1",
    reason="runs once, and the vendors' packages are there for Linux on x86-64 only",
)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[str]]]:
    """What the tests print in each environment; both are made and tested at once."""
    if not shutil.which("gcc") or not shutil.which("nm"):
        pytest.skip("making the environment for IPEX needs gcc and binutils")

    def run(vendor: str) -> str:
        directory = cache_folder() / "vendors" / vendor
        command = ["bash", str(ROOT / "tests/vendors/make_env.sh"), vendor, str(directory), python_of(PYTHON)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}"
        in_environment = partial(pytest_in_a_process, python=str(directory / "bin/python"), timeout=1200)
        cases = in_environment("tests/test_functional.py", "-k", vendor)
        oldest = in_environment(*OLDEST_TORCH) if vendor == "ipex" else ""
        return "\n".join((in_environment("tests/vendors"), cases, oldest))

    with ThreadPoolExecutor(2) as pool:
        yield {vendor: pool.submit(run, vendor) for vendor in VENDORS}


@pytest.mark.parametrize("vendor", VENDORS)
def test_with_the_real_package(vendor: str, runs: dict[str, Future[str]], ledger: Ledger) -> None:
    output = runs[vendor].result()
    assert "no vendor's package is installed" not in output
    ledger.elsewhere(f"tests/vendors with {vendor}", output)
