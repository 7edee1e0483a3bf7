# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, on a few short rows: that what they time is right, and that every column is filled."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from normkit.bench import report
from normkit.bench.contest import Case as Shape
from normkit.bench.contest import Contest
from normkit.bench.traffic import moved_bytes
from normkit.plan import Step

from .cases import Case, tagged
from .process import ROOT

GPU = ROOT / "benchmarks/gpu.sh"
STAGES = [
    "machine",
    "tests",
    "memcheck",
    "racecheck",
    "initcheck",
    "large",
    "torch",
    "torch_compile",
    "decode",
    "jax",
    "plans",
    "torch_gpu",
    "torch_decode",
]


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
    rows = report.read(ROOT / "benchmarks/results/cpu.csv")
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


# All of them


def run_all(python: str, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run benchmarks/gpu.sh with a Python, and with commands of a folder before others."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHON": python, "PATH": os.pathsep.join((path, os.environ["PATH"]))}
    command = ["bash", str(GPU), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=600, check=False)


def script(folder: Path, name: str, *lines: str) -> str:
    """Write a command, and return where it is."""
    file = folder / name
    file.write_text("\n".join(("#!/usr/bin/env bash", *lines, "")), encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def test_all_benchmarks_run_from_a_checkout(tmp_path: Path) -> None:
    for package in ("torch", "triton", "jax", "tabulate", "tqdm", "hypothesis", "ml_dtypes"):
        pytest.importorskip(package)
    output = tmp_path / "output"
    script(tmp_path, "compute-sanitizer", "echo sanitized: $@")
    done = run_all(sys.executable, str(tmp_path), "--tiny", str(output))
    *_, verdicts = done.stdout.split("\n\n")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in verdicts.splitlines()]
    assert [(name, verdict) for name, _, _, verdict, *_ in lines] == [
        (name, "NOT" if name == "torch_compile" else "passed") for name in STAGES
    ]
    tables = {"torch_gpu.csv", "torch_decode.csv", "jax_gpu.csv", "plans.csv"}
    plots = {"torch_gpu.svg", "torch_decode.svg"} if find_spec("matplotlib") else set()
    assert {file.name for file in output.iterdir()} == {"gpu_log.txt", "gpu_summary.txt"} | tables | plots
    assert all((output / name).read_text(encoding="utf-8").count("\n") > 2 for name in tables)
    log = (output / "gpu_log.txt").read_text(encoding="utf-8")
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"sanitized: --tool {tool} --error-exitcode 9" in log
    assert "--kernel-name kns=forward_rows" in log and "-m benchmarks.calls --tiny" in log


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """With a Python that writes what it was asked, as the script is for a GPU."""
    asked = tmp_path / "asked.txt"
    python = script(
        tmp_path,
        "python",
        f'echo "$*" >>{asked}',
        'while (($#)); do case "$1" in --csv | --output) printf "name\\n$2\\n" >"$2" ;; esac; last="$last $1"; shift; done',
        'case "$last" in *"-m pytest"* | *"-m benchmarks.jax_gpu"*) echo "FAILED tests/test_x.py"; exit 3 ;; esac',
    )
    script(tmp_path, "compute-sanitizer", "exit 9")
    output = tmp_path / "output"
    done = run_all(python, str(tmp_path), str(output))
    assert done.returncode == 1
    *_, verdicts = done.stdout.split("\n\n")
    found = {line.split()[0]: line.split(maxsplit=3)[3] for line in verdicts.splitlines()}
    assert list(found) == [*STAGES[:5], "prepare_torch", "prepare_plans", "prepare_torch_compile", *STAGES[5:]]
    failed = {name: verdict for name, verdict in found.items() if verdict != "passed"}
    sanitizer = dict.fromkeys(("memcheck", "racecheck", "initcheck"), "FAILED: exit status 9")
    assert failed == sanitizer | dict.fromkeys(("tests", "jax"), "FAILED: exit status 3")
    assert "\nFAILED tests/test_x.py\n" in done.stdout
    # both stages are in one file
    head, *lines = (output / "torch_gpu.csv").read_text(encoding="utf-8").splitlines()
    assert head == "name" and [Path(line).name for line in lines] == ["torch_gpu.csv", "compiled.csv"]
    commands = asked.read_text(encoding="utf-8")
    assert "--tiny" not in commands and "--cases 1x4096 1x8192 2x4096" in commands
    named = next(line for line in commands.splitlines() if "-m pytest" in line)
    assert all((ROOT / word).exists() for word in named.split() if word.startswith("tests/"))


@pytest.mark.parametrize(
    ("name", "says"),
    [("plans", "error: "), ("exchange", "benchmarks.exchange needs vLLM or IPEX: run it in an environment of")],
)
def test_a_benchmark_says_what_it_needs(name: str, says: str, tmp_path: Path) -> None:
    """Not on the machine of such a benchmark, or as if on another one: without a GPU, without a vendor's package."""
    for package in ("torch", "jax"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--output", str(tmp_path / "results.csv")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "results.csv").exists()


def test_a_rehearsal_writes_nothing_among_the_results(tmp_path: Path) -> None:
    done = run_all(sys.executable, str(tmp_path), "--tiny")
    assert done.returncode == 2 and "a rehearsal needs an output folder" in done.stderr
