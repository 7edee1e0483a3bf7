# SPDX-License-Identifier: Apache-2.0
"""`normkit bench` on a few short rows: what it measures is right and in order, and what it shows is what it measured."""

from __future__ import annotations

import csv
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normkit import bench
from normkit.__main__ import main
from normkit.bench import circumstances, command, compete, contestants, device, measure, report, with_arrays
from normkit.bench.contest import PASSES, Case, Contest, Program
from normkit.bench.contestants import COPY, TABLE, Contestant
from normkit.bench.verify import VERIFIED_ROWS, WrongResultError

from .process import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

TINY = Contest(Case(3, 64), "float32", "rms", "forward")
NUMPY = next(each for each in TABLE if each.name == "numpy")
LITTLE = ("--cases", "2x64", "--kinds", "rms", "--dtypes", "float32", "--seconds", "1e-6")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, command):
        monkeypatch.setattr(module, "ROUNDS", 2)


def competed(contest: Contest, *of: Contestant, cache_bytes: int = 2**30) -> compete.Outcome:
    where = replace(device.processor(), cache_bytes=cache_bytes)
    return compete.compete(contest, [*of, contestants.copy()], where, seconds=1e-6)


def scaled(contestant: Contestant, result: str, ours: bool) -> Contestant:
    """Return the contestant with one of its results 2 % too large."""

    def program(contest: Contest) -> Program:
        right = contestant.program(contest)

        def results(buffers: Any, returned: Any) -> dict[str, Any]:
            assert right.results is not None
            found = right.results(buffers, returned)
            return found | {result: found[result] * np.float32(1.02)}

        return right._replace(results=results)

    return Contestant("scaled", contestant.framework, program, ours=ours)


# The command


def test_table_csv_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    here = [each for each in TABLE if find_spec(each.framework) and "cpu" in each.devices]
    names = [each.name for each in here if not each.name.endswith(".compile")]
    written, picture = tmp_path / "results" / "cpu.csv", tmp_path / "cpu.svg"
    assert main(["bench", *LITTLE, "--contestants", *names, "--csv", str(written), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    with written.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert set(report.COLUMNS) | {"processor", "commit", "date", *circumstances.ALLOCATOR} <= set(lines[0])
    ran = {(line["contestant"], line["pass"]) for line in lines}
    assert {(COPY, pass_) for pass_ in PASSES} | {("normkit", "forward"), ("numpy", "forward")} <= ran
    for framework, passes in {"torch": PASSES[:3], "jax": PASSES[::3]}.items():
        assert not find_spec(framework) or {(f"normkit_{framework}", pass_) for pass_ in passes} <= ran
    for line in lines:
        assert 0 < float(line["us_p20"]) <= float(line["us_median"]) <= float(line["us_p80"])
        assert bool(line["worst_error"]) == bool(line["within_bounds"]) == (line["contestant"] != COPY)
        ours = line["contestant"].startswith("normkit")
        assert bool(line["implementation"]) == ours
        assert not ours or (line["within_bounds"], float(line["ratio_to_normkit"])) == ("yes", 1)
        assert line["contestant"] != COPY or float(line["percent_of_copy"]) == 100
        assert f"| {line['case']}" in out and f"| {line['contestant']}" in out
    assert picture.read_text(encoding="utf-8").count("forward, rms, float32") == 1
    assert "NumPy has no gradients" in out and "geometric means" in out
    # what was read back is what was measured, and is shown in the same way
    assert main(["bench", "--read", str(written), "--plot", str(tmp_path / "again.png")]) == 0
    again = capsys.readouterr().out
    assert again.split("\n\n")[0].strip() in out
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contestants", "tourch"], "there is no such contestant on cpu; there are normkit_torch, normkit_torch.compile"),
        (["--contestants", "normkit_jax", "--frameworks", "numpy"], "belongs to --frameworks numpy"),
        (["--cases", "16by4096"], "such as 16x4096, both at least 1; got '16by4096'"),
        (["--cases", "0x4096"], "both at least 1; got '0x4096'"),
        (["--seconds", "0"], "--seconds must be more than 0, got 0.0"),
        (["--plot", "out.pdf"], "--plot draws .png or .svg, got out.pdf"),
        (["--threads", "100000"], "--threads must be from 1 to"),
        (["--read", "nowhere.csv"], "cannot read nowhere.csv: FileNotFoundError"),
        (["--read", str(ROOT / "README.md")], "pass a CSV file that normkit bench wrote"),
        ([*LITTLE, "--frameworks", "numpy", "--passes", "backward"], "nothing to measure. Not run:\n  normkit, numpy in"),
    ],
)
def test_what_cannot_run_is_an_error(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "options"), [("matplotlib", ["--plot", "a.png"]), ("tabulate", []), ("tqdm", [])], ids=lambda each: str(each)
)
def test_a_missing_package_is_an_error_with_the_pip_command(
    package: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["bench", *options]) == 2
    assert 'pip install -e ".[bench]"' in capsys.readouterr().err


def test_a_wrong_normkit_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "TABLE", (scaled(NUMPY, "y", ours=True),))
    assert main(["bench", *LITTLE]) == 1
    assert "scaled () is wrong on 2x64 float32 rms forward" in capsys.readouterr().err


def test_threads_are_those_of_every_framework() -> None:
    code = """
import normkit.cpu.numpy
from normkit.bench import circumstances
circumstances.limit_threads(1)
print(circumstances.processors(), normkit.cpu.numpy.threads(), circumstances.torch_threads() or 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1", "1"]


def test_circumstances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    found = circumstances.collect()
    assert found["MALLOC_MMAP_MAX_"] == "0" and found["numpy"] == np.__version__ and found["processor"]
    assert (found["torch"] != "") == (find_spec("torch") is not None)
    monkeypatch.setattr(circumstances, "_ROOT", tmp_path)
    assert circumstances.commit() == ""


# Verification


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_every_contestant_is_right(kind: str, pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("torch"):
        import torch

        # as its own compiler takes seconds
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    # more rows than are verified, so that dy is zero in some
    contest = Contest(Case(VERIFIED_ROWS + 9, 128), "float32", kind, pass_)
    expected = {each.name for each in TABLE if each.refusal(contest) is None}
    rows, _ = competed(contest, *TABLE)
    assert {row.contestant for row in rows} == expected | {COPY}
    assert {row.contestant: row.worst_error for row in rows if row.within_bounds == "no"} == {}


@pytest.mark.parametrize(
    ("name", "pass_", "result"),
    [
        *(("numpy", "forward", result) for result in ("y", "residual_out")),
        *(("torch", "in-place", result) for result in ("y", "residual_out")),
        *(("torch", "backward", result) for result in ("dx", "dresidual", "dweight", "dbias")),
        *(("jax.jit", "forward-and-backward", result) for result in ("y", "dx", "dweight", "dbias")),
    ],
)
def test_a_wrong_result_is_seen(name: str, pass_: str, result: str) -> None:
    contestant = next(each for each in TABLE if each.name == name)
    pytest.importorskip(contestant.framework)
    contest = Contest(Case(3, 64), "float32", "layer", pass_)
    rows, _ = competed(contest, scaled(contestant, result, ours=False))
    assert [row.within_bounds for row in rows] == ["no", ""]
    with pytest.raises(WrongResultError, match="scaled"):
        competed(contest, scaled(contestant, result, ours=True))


def test_a_contestant_that_fails_is_reported_and_normkit_is_not_let_off() -> None:
    def program(contest: Contest) -> Program:
        raise RuntimeError("no  compiler")

    rows, absent = competed(TINY, NUMPY, Contestant("failing", "numpy", program))
    assert [row.contestant for row in rows] == ["numpy", COPY]
    assert [(each.contestant, each.reason) for each in absent] == [("failing", "RuntimeError: no compiler")]
    assert report.not_run(absent, 7) == "Not run:\n  failing in 1 of 7: RuntimeError: no compiler"
    with pytest.raises(RuntimeError, match="no  compiler"):
        competed(TINY, Contestant("failing", "numpy", program, ours=True))


# Timing


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, log: list[str], name: str) -> Callable[[int], Callable[[], None]]:
        """Return calls that take so many seconds, the first of a block ten times as many; making ready takes a day."""

        def ready(index: int) -> Callable[[], None]:
            self.now += 86400

            def call() -> None:
                assert not gc.isenabled()
                log.append(f"{name}{index}")
                self.now += seconds * (10 if index == 0 else 1)

            return call

        return ready


def test_contestants_are_timed_in_turn_without_the_first_calls_and_what_makes_them_ready() -> None:
    clock, log, ticks = Clock(), list[str](), list[int]()
    of = {"a": clock.takes(1e-3, log, "a"), "b": clock.takes(0.5, log, "b")}
    blocks = {name: measure.by_clock(ready, clock) for name, ready in of.items()}
    times = measure.interleaved(blocks, 0.02, tick=lambda: ticks.append(len(log)))
    assert times["a"] == pytest.approx((1e-3, 1e-3, 1e-3, 20))
    assert times["b"] == pytest.approx((0.5, 0.5, 0.5, 6))
    starts = [call[0] for call in log if call[1:] == "0"]
    assert starts == ["a", "b", "a", "b", "b", "a"]  # to warm up, then in two rounds
    assert len(ticks) == 2 and ticks[-1] == len(log)
    assert gc.isenabled()


def test_a_contest_that_the_cache_does_not_hold_works_on_two_sets() -> None:
    seen: list[int] = []

    def program(contest: Contest) -> Program:
        plain = with_arrays.plain_numpy(contest)

        def ready(arrays: Any) -> Callable[[], Any]:
            seen.append(id(arrays))
            return plain.ready(arrays)

        return plain._replace(ready=ready)

    contestant = Contestant("spy", "numpy", program)
    for cache_bytes, sets in ((TINY.moved_bytes, 1), (TINY.moved_bytes - 1, 2)):
        seen.clear()
        competed(TINY, contestant, cache_bytes=cache_bytes)
        # the first one is that of the verification
        assert len(set(seen[1:])) == sets
        assert sets == 1 or seen[1] != seen[2]


def test_what_is_overwritten_gets_its_values_again() -> None:
    torch = pytest.importorskip("torch")
    contest = Contest(Case(3, 64), "float16", "rms", "in-place")
    program = next(each for each in TABLE if each.name == "normkit_torch").program(contest)
    arrays, shared = contest.arrays(0), dict[Any, list[Any]]()
    ready = compete._ready(program, [arrays], shared)
    [[tensors]] = shared.values()
    for index in range(3):
        ready(index)()
    assert not torch.equal(tensors.residual, torch.from_numpy(arrays.residual))
    ready(compete._RESET_AFTER)
    for name in ("x", "residual"):
        assert torch.equal(getattr(tensors, name), torch.from_numpy(getattr(arrays, name)))


@pytest.mark.parametrize("copy", ["torch", "numpy"])
def test_the_copy_moves_the_bytes_of_the_contest(copy: str) -> None:
    pytest.importorskip(copy)
    contest = Contest(Case(7, 96), "bfloat16", "layer", "backward")
    program = getattr(bench, f"with_{'torch' if copy == 'torch' else 'arrays'}").copy(contest)
    source, destination = program.put(contest.arrays(0))
    assert 0 <= contest.moved_bytes - (source.nbytes + destination.nbytes) < 4
    source[:] = 2
    program.ready((source, destination))()
    assert (destination == 2).all()


def test_the_summary_has_the_geometric_means() -> None:
    [row, _] = competed(TINY, NUMPY).rows
    rows = [replace(row, rows=rows, ratio_to_normkit=ratio) for rows, ratio in ((16, 2.0), (17, 8.0))]
    line = next(line for line in report.summary(rows).splitlines() if line.startswith("| numpy"))
    assert line.replace("|", " ").split() == ["numpy", "forward", "host", "rms", "float32", "2", "4.00", "1", "2.00"]
    assert "nothing to compare" in report.summary([row])
