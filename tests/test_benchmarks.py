# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, on a few short rows: that what they time is right, and that every column is filled."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest

from normkit.bench import report
from normkit.bench.contest import Case as Shape
from normkit.bench.contest import Contest
from normkit.bench.traffic import moved_bytes
from normkit.plan import Step

from .cases import Case, tagged
from .process import ROOT


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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="a driver is asked for, which the interpreter has not")
def test_programs_for_gpus_see_every_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    torch = pytest.importorskip("torch")
    from benchmarks import calls, plans
    from normkit import kernels
    from normkit.bench.contest import Arrays
    from normkit_torch import add_rms_norm

    from .fake_driver import fake_driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, weight = torch.ones(3, 256, dtype=torch.bfloat16), torch.ones(256, dtype=torch.bfloat16)
    expected = {"forward": ["forward_rows"], "in-place": ["forward_rows"], "backward": ["backward_rows", "sum_partials"]}
    with fake_driver() as driver:
        for pass_, names in expected.items():
            arrays = Arrays(rows, rows.clone(), weight, None, rows.clone(), rows.clone())
            found, _ = plans.launches(Contest(Shape(3, 256), "bfloat16", "rms", pass_), arrays)
            assert [step.kernel for step, _ in found] == names
        driver.launches.clear()
        with calls.launches() as counted:
            for _ in range(3):
                leaf = rows.clone().requires_grad_()
                torch.autograd.grad(add_rms_norm(leaf, rows, weight.requires_grad_())[0], [leaf, weight], rows)
        assert set(counted) <= set(kernels.__all__)
        assert counted.total() == len(driver.launches) == 9


# inductor imports parts of torch that use torch.jit, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
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


def test_results_from_before_there_were_clocks_can_be_read() -> None:
    assert {row.clock for row in report.read(ROOT / "benchmarks/results/cpu.csv")} == {"host"}


def test_a_machine_that_is_not_quiet_is_told_of() -> None:
    rows = [replace(row, us_p80=1.5 * row.us_p20) for row in report.read(ROOT / "benchmarks/results/cpu.csv")]
    of_copy = next(row for row in rows if row.contestant == "copy")
    spread = [replace(of_copy, us_p20=12.2, us_p80=7990.0), *(row for row in rows if row is not of_copy)]
    assert report.warning(rows) == "" and f"in {of_copy.case} from 12.2 to 7990 us" in report.warning(spread)


# Plans


def test_alternatives_have_the_grid_that_goes_with_them() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    from benchmarks import plans

    rows = Step("forward_rows", (64,), {"HIDDEN": 100, "BLOCK_M": 16, "BLOCK_N": 128}, 4)
    found = dict(plans.alternatives(rows, 1010))
    assert set(found) == {
        f"forward_rows num_warps={warps} BLOCK_M={size} BLOCK_N=128" for warps in (2, 4, 8) for size in (8, 16, 32)
    } - {plans.described(rows)}
    assert {step.constants["BLOCK_M"]: step.grid for step in found.values()} == {8: (127,), 16: (64,), 32: (32,)}
    # to the rows of a program belong partial sums, which stay as many; a row too long for its block has a program of its own
    parts = Step("backward_rows", (64,), {"HIDDEN": 100, "BLOCK_M": 16, "BLOCK_N": 128}, 4)
    long = Step("forward_long", (64,), {"HIDDEN": 2**18, "BLOCK_N": 4096}, 8)
    for step, count in ((parts, 1010), (long, 64)):
        assert {other.grid for _, other in plans.alternatives(step, count)} == {(64,)}
    columns = Step("backward_columns", (64, 7), {"HIDDEN": 2**14, "BLOCK_N": 256}, 1)
    assert {other.grid for _, other in plans.alternatives(columns, 500)} == {(128, 7), (64, 7), (32, 7)}
    twice = Step("backward_twice", (4,), {"HIDDEN": 16384, "BLOCK_N": 4096, "PIECES": 4}, 16)
    others = [other for _, other in plans.alternatives(twice, 300)]
    pieces = {(*other.grid, other.constants["BLOCK_N"], other.constants["PIECES"]) for other in others}
    assert pieces == {(4, 2048, 8), (4, 4096, 4), (4, 8192, 2)}


def test_no_alternative_spills_or_has_more_threads_than_there_are() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    from benchmarks import plans

    step = Step("forward_rows", (64,), {"HIDDEN": 2**14, "BLOCK_M": 1, "BLOCK_N": 2**14}, 8)
    found = {(other.num_warps, other.constants["BLOCK_M"]) for _, other in plans.alternatives(step, 64)}
    assert found == {(4, 1), (16, 1), (8, 2), (16, 2)}
    assert all(
        other.num_warps == 16 for _, other in plans.alternatives(replace(step, num_warps=32), 64) if other.num_warps < 32
    )


def test_only_what_is_right_and_clearly_faster_is_named() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    from benchmarks import plans

    row = report.read(ROOT / "benchmarks/results/cpu.csv")[0]
    times = {"planned": (9, 10, 11), "faster": (4, 5, 6), "as fast": (8, 9, 10), "wrong": (1, 1, 1), "fastest": (3, 4, 5)}
    rows = [
        replace(row, contestant=name, us_p20=low, us_median=middle, us_p80=high, worst_error=2.0 if name == "wrong" else 0.5)
        for name, (low, middle, high) in times.items()
    ]
    line = plans.verdict(Contest(Shape(2, 64), "float32", "rms", "forward"), rows)
    assert line.endswith("faster: fastest 2.50 x, faster 2.00 x")
