# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, on a few short rows: that what they time is right, and that every column is filled."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from normkit.bench.traffic import moved_bytes

from .cases import Case, tagged


def test_jax_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jax")
    from benchmarks import jax_gpu

    output = tmp_path / "results" / "jax_gpu.csv"
    jax_gpu.main(
        ["--tiny", "--samples", "2", "--output", str(output), "--cases", "llama_3_8b", "gpt_2_batch", "qk_norm_prefill"]
    )
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(jax_gpu.COLUMNS)
    for case in ("llama_3_8b", "gpt_2_batch", "qk_norm_prefill"):
        for mode in ("forward", "forward-and-backward"):
            of = {row["implementation"]: row for row in rows if (row["case"], row["mode"]) == (case, mode)}
            assert {"copy", "normkit", "xla"} <= set(of)
            assert float(of["normkit"]["worst_error"]) <= 1
            # the expression left to XLA is right too; its backward rounds once more, before it adds dresidual_out
            assert mode != "forward" or float(of["xla"]["worst_error"]) <= 1
            for row in of.values():
                assert 0 < float(row["us_p20"]) <= float(row["us_median"]) <= float(row["us_p80"])
                assert row["device"] and row["commit"] and row["date"] and row["jax"]
    assert "normkit" in capsys.readouterr().out


def test_jax_gpu_is_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jax = pytest.importorskip("jax")
    from benchmarks import jax_gpu

    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        jax_gpu.main(["--output", str(tmp_path / "out.csv")])
    assert "this is for a GPU" in capsys.readouterr().err


def test_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton launches nothing while it interprets")
    from benchmarks import launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    output = tmp_path / "results" / "launch.csv"
    launch.main(["--output", str(output), "--seconds", "0.001", "--hidden-size", "64"])
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(launch.COLUMNS)
    for name in ("in-place", "forward", "backward"):
        of = [row for row in rows if row["pass"] == name]
        assert len(of) > 2 and of[0]["way"].startswith(launch.JIT) and of[0]["ratio_to_jit"] == "1.00"
    for row in rows:
        assert 0 < float(row["us_p20"]) <= float(row["us_median"]) <= float(row["us_p80"])
        assert row["driver"] and row["triton"] and row["date"]
    assert "of Triton's own" in capsys.readouterr().out


def test_the_byte_model() -> None:
    """Worked out by hand for bfloat16: forward x, residual, y, residual_out; backward dy, h, dresidual_out, dx."""
    problem = Case("bytes", "rms", (1000, 100)).problem()
    assert moved_bytes(problem, "forward") == moved_bytes(problem, "in-place") == 4 * 1000 * 100 * 2 + 100 * 2
    assert moved_bytes(problem, "backward") == 4 * 1000 * 100 * 2 + 1000 * 4 + 2 * 100 * 2
    assert moved_bytes(problem, "forward-and-backward") == 8 * 1000 * 100 * 2 + 2 * 1000 * 4 + 3 * 100 * 2


def test_a_wrong_competitor_is_seen() -> None:
    pytest.importorskip("jax")
    from benchmarks import jax_gpu

    case = jax_gpu.tiny(next(case for case in tagged("bench") if case.name == "llama_3_8b"))
    (arrays,) = jax_gpu.buffers(case, 1)
    y, residual_out = jax_gpu.competitors(case)["xla"](*arrays[:4])
    assert jax_gpu.worst_error(case, "forward", arrays, (y, residual_out)) <= 1
    assert jax_gpu.worst_error(case, "forward", arrays, (y * 1.02, residual_out)) > 1
