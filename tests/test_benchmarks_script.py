# SPDX-License-Identifier: Apache-2.0
"""The script that runs all benchmarks on a GPU, and what a benchmark says that cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
