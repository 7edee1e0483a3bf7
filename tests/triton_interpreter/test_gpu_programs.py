# SPDX-License-Identifier: Apache-2.0
"""The programs of `benchmarks` that launch kernels on a GPU, with kernels that are interpreted: what they say is so."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calls, plans
from normkit import kernels
from normkit.bench import gpu, measure
from normkit.bench.contest import Case, Contest
from normkit.plan import Step
from normkit_torch import steps

from ..frameworks import Torch


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)


def test_every_kernel_is_called_in_every_form_and_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert calls.main(["--tiny"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}, {form}" in out for name in calls.NAMES for form in calls.FORMS)
    assert all(f"{name} " in out.splitlines()[-1] for name in kernels.__all__)


def test_large_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert calls.main(["--tiny", "--large"]) == 0
    assert "3x64 bfloat16 rms backward" in capsys.readouterr().out


def test_what_is_wrong_fails_or_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(calls, "NAMES", ("gpt_2",))
    assert calls.main(["--tiny"]) == 1
    assert "never launched: backward_columns backward_long" in capsys.readouterr().out

    call = Torch.call

    def doubled(self: Any, *arguments: Any) -> Any:
        y, residual_out = call(self, *arguments)
        return 2 * y, residual_out

    monkeypatch.setattr(Torch, "call", doubled)
    monkeypatch.setattr(Torch, "gradients", None)
    assert calls.main(["--tiny"]) == 1
    out = capsys.readouterr().out
    assert "gpt_2, forward  WRONG" in out and "FAILED  gpt_2, backward: TypeError" in out


@pytest.mark.parametrize("pass_", plans.PASSES)
def test_alternatives_to_a_plan_are_right_and_all_are_written(
    pass_: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "plans.csv"
    arguments = ["--tiny", "--passes", pass_, "--kinds", "layer", "--dtypes", "float32", "--seconds", "1e-6"]
    assert plans.main([*arguments, "--without", "sum_partials", "--output", str(output)]) == 0
    with output.open(newline="", encoding="utf-8") as file:
        found = {line["contestant"]: line for line in csv.DictReader(file)}
    kernel = "backward_rows" if pass_ == "backward" else "forward_rows"
    assert {f"{kernel} num_warps={warps} BLOCK_M=8 BLOCK_N=128" for warps in (2, 4, 8)} <= set(found)
    assert {line["within_bounds"] for name, line in found.items() if name != "copy"} == {"yes"}
    assert f"\n  {kernel} num_warps=4 BLOCK_M=16 BLOCK_N=128" in capsys.readouterr().out


def test_a_plan_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = plans.launches

    def launches(contest: Contest, tensors: Any) -> Any:
        if contest.kind == "rms":
            raise RuntimeError("out of shared memory")
        return original(contest, tensors)

    monkeypatch.setattr(plans, "launches", launches)
    output = tmp_path / "plans.csv"
    assert (
        plans.main(["--tiny", "--passes", "forward", "--dtypes", "float32", "--seconds", "1e-6", "--output", str(output)]) == 1
    )
    out = capsys.readouterr().out
    assert "FAILED: RuntimeError: out of shared memory" in out and "layer forward device: " in out


def test_what_is_timed_is_what_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = Contest(Case(3, 64), "float32", "rms", "backward", "device")
    arrays = gpu.arrays("cpu", contest, 0)
    made: list[Step] = []
    monkeypatch.setattr(steps, "launch", lambda step, arguments: made.append(step))
    planned = [step for step, _ in plans.launches(contest, arrays)[0]]
    made.clear()
    other = plans.with_constants(planned[0], planned[0].constants, 2 * planned[0].num_warps, 3)
    plans.program(lambda step: other if step == planned[0] else step, contest).ready(arrays)()
    # the forward of a backward is as planned
    assert [step.kernel for step in made] == ["forward_rows", "backward_rows", "sum_partials"]
    assert made[1:] == [other, *planned[1:]]
