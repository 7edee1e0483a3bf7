# SPDX-License-Identifier: Apache-2.0
"""`normkit bench --device cuda` without a GPU: what only a GPU can do has a stand-in, and a fake whose time is known."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from normkit.__main__ import main
from normkit.bench import command, gpu, measure
from normkit.bench.compete import compete
from normkit.bench.contest import Case, Contest
from normkit.bench.contestants import COPY, TABLE, Contestant, copy
from normkit.errors import OptionError

TINY = ("--device", "cuda", "--tiny", "--seconds", "1e-6", "--contestants", "normkit_torch", "torch")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, command):
        monkeypatch.setattr(module, "ROUNDS", 2)


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The command


def test_the_usual_contests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tabulate")
    written = tmp_path / "torch.csv"
    assert main(["bench", *TINY, "--csv", str(written)]) == 0
    lines = lines_of(written)
    assert {(line["case"], line["clock"], line["dtype"]) for line in lines} == {("2x128", "device", "bfloat16")}
    for pass_ in ("forward", "in-place", "backward"):
        for kind in ("rms", "layer"):
            of = {line["contestant"]: line for line in lines if (line["pass"], line["kind"]) == (pass_, kind)}
            assert set(of) == {"normkit_torch", "torch", COPY}
            assert of["normkit_torch"]["within_bounds"] == "yes"
    assert all(line["device"] == "none: --tiny" and float(line["gb_per_s"]) > 0 for line in lines)
    assert "| device" in capsys.readouterr().out


def test_decoding(tmp_path: Path) -> None:
    pytest.importorskip("tabulate")
    written, passes = tmp_path / "decode.csv", ("forward", "in-place")
    options = ["--cases", *command.DECODE_CASES, "--kinds", "rms", "--passes", *passes, "--clocks", "graph", "host"]
    assert main(["bench", *TINY, *options, "--csv", str(written)]) == 0
    lines = lines_of(written)
    found = {(line["case"], line["clock"]) for line in lines}
    assert found == {(f"{rows}x128", clock) for rows in (1, 2) for clock in ("graph", "host")}
    # to launch is not to move anything
    assert all(bool(line["gb_per_s"]) == bool(line["percent_of_copy"]) == (line["clock"] == "graph") for line in lines)


def test_the_usual_cases_move_a_gibibyte() -> None:
    cases = [Case.parse(case) for case in command.USUAL["cuda"].cases]
    assert [case.hidden_size for case in cases] == [128, 512, *(1024 * 2**n for n in range(9)), 2**20]
    for pass_ in ("forward", "in-place", "backward"):
        moved = [Contest(case, "bfloat16", "rms", pass_).moved_bytes / 2**30 for case in cases]
        assert 1 <= min(moved) <= max(moved) < 1.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--device", "cuda", "--contestants", "ipex"],
            "no such contestant on cuda; there are normkit_torch, normkit_torch.compile",
        ),
        (["--device", "cuda", "--frameworks", "jax"], "none of the contestants on cuda belongs to --frameworks jax"),
        (["--clocks", "device"], "on the processor there is only the clock host"),
        (["--device", "cuda", "--clocks", "graph"], "is for --passes forward in-place, got forward in-place backward"),
        (["--device", "cuda"], "sees no CUDA device; --tiny tries all but the GPU"),
    ],
)
def test_what_cannot_run_is_an_error(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tabulate")
    if options == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_contest_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tabulate")

    def failing(contest: Contest, *rest: Any, **options: Any) -> Any:
        if contest.kind == "rms":
            raise RuntimeError("out of memory")
        return compete(contest, *rest, **options)

    monkeypatch.setattr(command, "compete", failing)
    written = tmp_path / "torch.csv"
    assert main(["bench", *TINY, "--passes", "forward", "--csv", str(written)]) == 1
    assert "2x128 bfloat16 rms forward device: RuntimeError: out of memory" in capsys.readouterr().err
    assert {line["kind"] for line in lines_of(written)} == {"layer"}


def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    contest = Contest(Case(2**20, 1024), "bfloat16", "rms", "forward")
    small = SimpleNamespace(empty_cache=lambda: None, mem_get_info=lambda: (80 * 2**30, 80 * 2**30))
    where = gpu.device_of(small, "cpu", 0, {})
    with pytest.raises(OptionError, match="may need 96 GiB, 12 times what it moves, and the GPU has 80 GiB free"):
        compete(contest, [copy()], where, seconds=1e-6)


# Timing


class Fake:
    """A GPU on which each call takes a millisecond, and the processor, which does not wait, none."""

    def __init__(self) -> None:
        self.milliseconds, self.captured, self.waited = 0.0, list[Any](), 0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.milliseconds

            def elapsed_time(self, end: Any) -> float:
                assert fake.waited, "an event is read before the GPU is waited for"
                return float(end.at - self.at)

        class Graph:
            def replay(self) -> None:
                assert fake.captured
                fake.milliseconds += len(fake.captured)

        self.Event, self.CUDAGraph, self.capturing = Event, Graph, False

    def synchronize(self) -> None:
        self.waited += 1

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False

    def ready(self, index: int) -> Callable[[], None]:
        self.milliseconds += 1000  # making ready is not timed

        def call() -> None:
            if self.capturing:
                self.captured.append(index)
            else:
                self.milliseconds += 1

        return call


def test_events_time_each_call_alone_and_wait_once() -> None:
    fake = Fake()
    assert gpu.by_events(fake, fake.ready)(3) == [1e-3] * 3
    assert fake.waited == 1


def test_a_graph_is_of_calls_and_times_are_those_of_one() -> None:
    fake = Fake()
    block = gpu.by_graph(fake, fake.ready)
    assert fake.captured == list(range(gpu.CALLS_IN_A_GRAPH))
    assert block(2) == [1e-3] * 2


def test_launches_are_timed_with_an_empty_queue() -> None:
    fake = Fake()
    times = gpu.by_launch(fake, fake.ready)(4)
    assert len(times) == 4 and max(times) < 0.5 and fake.waited == 2


def test_what_cannot_be_captured_is_reported() -> None:
    class OnceUncapturable(gpu.StandIn):
        captures = 0

        @contextmanager
        def graph(self, graph: Any) -> Iterator[None]:
            self.captures += 1
            if self.captures == 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield

    contest = Contest(Case(2, 64), "float32", "rms", "forward", "graph")
    peer = next(each for each in TABLE if each.name == "torch")
    rows, absent = compete(contest, [peer, copy()], gpu.device_of(OnceUncapturable(), "cpu", 1024, {}), seconds=1e-6)
    assert [row.contestant for row in rows] == [COPY] and "not permitted when stream is capturing" in absent[0].reason


def test_who_writes_nothing_does_not_find_the_right_results_in_its_memory() -> None:
    results: list[dict[str, Any]] = []
    peer = next(each for each in TABLE if each.name == "torch")

    def program(contest: Contest) -> Any:
        right = peer.program(contest)

        def kept(*arguments: Any) -> dict[str, Any]:
            results.append(right.results(*arguments))  # type: ignore[misc]
            return results[-1]

        return right._replace(results=kept)

    contest = Contest(Case(2, 64), "float32", "layer", "backward", "device")
    rows, _ = compete(contest, [Contestant("spy", "torch", program), copy()], gpu.stand_in(), seconds=1e-6)
    assert rows[0].within_bounds == "yes"
    assert len(results[0]) == 4 and all(tensor.isnan().all() for tensor in results[0].values())
