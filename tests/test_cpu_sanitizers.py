# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, compiled by g++ for this.

Their AVX-512 level is compiled in AVX2 instructions, by tests/cpu_sanitized/avx512.hpp, so that it runs on every processor.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from normkit.cpu import build

from .conftest import Ledger
from .process import ROOT, pytest_in_a_process

FOLDER = ROOT / "tests" / "cpu_sanitized"
SOURCES = ROOT / "normkit" / "cpu"
LEVELS = (0, 1, 2) if platform.machine() == "x86_64" else (0,)
# Python frees little at its end, which is no leak of the kernels; fresh memory is filled with NaN of any dtype
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824:print_legend=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}
# A call of the kernels for rows of 65 elements with arrays of 64, or with strides whose product has no 64 bits.
WRONG = """
import numpy as np
from pathlib import Path
from normkit.cpu import library
from normkit.spec import NormSpec, Operand, describe

library.LIBRARY = Path({path!r})
problem = describe(NormSpec("rms"), Operand((3, 65), "float32"))
x, y = np.ones(3 * 65 - {x_short}, np.float32), np.ones(3 * 65 - {y_short}, np.float32)
library.forward(problem, (x.ctypes.data, 0, 0, 0, y.ctypes.data, 0, 0, 0), ({stride}, 0) * 4, 1, 1, level={level})
print("not seen")
"""


def under_sanitizers(variables: dict[str, str], *arguments: str) -> str:
    """Run pytest with sanitizers, whose report goes past Python to the process's own standard error."""
    return pytest_in_a_process("--capture=sys", *arguments, variables=variables)


def runtime(sanitizer: str) -> str:
    """Return the path of a sanitizer's runtime; skip where g++ has none."""
    if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("runs once, on Linux")
    if not shutil.which("g++"):
        pytest.skip("the sanitizers need g++, which was not found")
    command = ["g++", f"-print-file-name=lib{sanitizer}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no lib{sanitizer}: install libgcc's development files")
    return path


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python with the sanitizers, and with kernels compiled for them."""
    preload = runtime("asan")
    library = tmp_path_factory.mktemp("sanitized") / "kernels.lib"
    wide = (*build._LEVELS["LEVEL_AVX2"], "-include", str(FOLDER / "avx512.hpp"))
    everywhere = '-D__builtin_cpu_supports(feature)=__builtin_cpu_supports("avx2")'
    with patch.dict(os.environ, CXX="g++"), patch.dict(build._LEVELS, LEVEL_AVX512=wide):
        flags = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", everywhere]
        # so that calls of a few rows are streamed, and others not
        build.build([*flags, "-DSTREAMED=8192"], library)
    return {**OPTIONS, "LD_PRELOAD": preload, "NORMKIT_TEST_KERNELS": str(library)}


def test_memory_and_behaviour(variables: dict[str, str], ledger: Ledger) -> None:
    ledger.elsewhere("tests/cpu_sanitized", under_sanitizers(variables, "tests/cpu_sanitized"))


def test_every_level_has_the_same_bits(variables: dict[str, str], ledger: Ledger) -> None:
    arguments = ("tests/test_cpu.py", "tests/test_cpu_conversions.py", "-k", "level or 16_bits or bfloat16")
    ledger.elsewhere("levels, AVX-512 in AVX2 instructions", under_sanitizers(variables, *arguments))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("reported", "wrong"),
    [
        ("heap-buffer-overflow", {"x_short": 1, "y_short": 0, "stride": 65}),
        ("heap-buffer-overflow", {"x_short": 0, "y_short": 1, "stride": 65}),
        ("signed integer overflow", {"x_short": 0, "y_short": 0, "stride": 2**62}),
    ],
    ids=["read", "write", "overflow"],
)
def test_what_is_wrong_is_reported(variables: dict[str, str], level: int, reported: str, wrong: dict[str, int]) -> None:
    code = WRONG.format(path=variables["NORMKIT_TEST_KERNELS"], level=level, **wrong)
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0 and reported in done.stderr, done.stdout + done.stderr


def test_threads(tmp_path: Path, ledger: Ledger) -> None:
    runtime("tsan")
    program = tmp_path / "threads"
    flags = ("-std=c++17", "-O1", "-g1", "-pthread", "-ffp-contract=off", "-Wno-psabi", "-fsanitize=thread")
    sources = (
        "-DLEVEL=LEVEL_BASELINE",
        '-DDIGEST=""',
        *(str(SOURCES / name) for name in ("kernels.cpp", "threads.cpp", "rows.cpp")),
    )
    compiled = subprocess.run(
        ["g++", *flags, *sources, str(FOLDER / "threads.cpp"), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program), "200"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ledger.elsewhere("tests/cpu_sanitized/threads.cpp", done.stdout)
