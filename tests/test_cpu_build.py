# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: compiling them, why there are none, and processes that share them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normkit.cpu import build, library

from .cpu_operands import COMPILED, operands, problem_of


def test_without_a_compiler_the_build_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    with pytest.raises(build.BuildError, match="no-such-compiler not found"):
        build.build(library=tmp_path / "kernels.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match=r"false .* failed"):
        build.build(library=tmp_path / "kernels.so")


def test_without_kernels_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "kernels.so")
    missing = library.load.__wrapped__()
    assert isinstance(missing, library.Missing)
    assert "not compiled" in missing.reason
    (tmp_path / "kernels.so").write_bytes(b"no library")
    broken = library.load.__wrapped__()
    assert isinstance(broken, library.Missing)
    assert "cannot be loaded" in broken.reason
    monkeypatch.setattr(library, "load", lambda: missing)
    rejected = library.supports(problem_of("rms", operands(2, 8, ("float32",) * 4)))
    assert rejected and "python -m normkit.cpu.build" in rejected.reason


@COMPILED
def test_kernels_of_other_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "digest", lambda: "other")
    missing = library.load.__wrapped__()
    assert isinstance(missing, library.Missing)
    assert "other sources" in missing.reason and "python -m normkit.cpu.build" in missing.reason


@COMPILED
def test_a_child_process_computes_too() -> None:
    code = (
        "import os, numpy as np, normkit\n"
        "x = np.ones((512, 512), np.float32)\n"
        "normkit.rms_norm(x, implementation='cpu')\n"
        "child = os.fork()\n"
        "normkit.rms_norm(x, implementation='cpu')\n"
        "os._exit(0) if child == 0 else print(os.waitpid(child, 0)[1])\n"
    )
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, **options)
    assert done.stdout.strip() == "0"
