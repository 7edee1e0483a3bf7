# SPDX-License-Identifier: Apache-2.0
"""`normkit bench --device cuda` without a GPU: what only a GPU can do has a stand-in, and a fake whose time is known."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from normkit.__main__ import main
from normkit.bench import command, gpu, measure
from normkit.bench.compete import compete
from normkit.bench.contest import Case, Contest
from normkit.bench.contestants import COPY, TABLE, copy
from normkit.errors import OptionError

TINY = ("--device", "cuda", "--tiny", "--seconds", "1e-6", "--contestants", "normkit_torch", "torch")
PEERS = {
    "liger": "liger_kernel.transformers.functional",
    "quack": "quack.rmsnorm",
    "flash_attn": "flash_attn.ops.triton.layer_norm",
    "flashinfer": "flashinfer.norm",
}


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
        (["--device", "cuda", "--contestants", "ipex"], "no such contestant on cuda; there are normkit_torch, torch"),
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


# Others' kernels


def module(name: str, **functions: Any) -> dict[str, ModuleType]:
    """Return a module with functions, and the packages that it is in."""
    parts = name.split(".")
    found = {".".join(parts[: n + 1]): ModuleType(".".join(parts[: n + 1])) for n in range(len(parts))}
    for each in found.values():
        each.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    vars(found[name]).update(functions)
    return found


def _norm(kind: str, h: Any, weight: Any, bias: Any, eps: float) -> Any:
    functional, hidden = torch.nn.functional, h.shape[-1:]
    return functional.rms_norm(h, hidden, weight, eps) if kind == "rms" else functional.layer_norm(h, hidden, weight, bias, eps)


def _peers() -> dict[str, dict[str, Any]]:
    """Functions with the parameters that the packages' own have, in plain torch."""

    def liger_fused_add_rms_norm(  # type: ignore[no-untyped-def]
        X, R, W, eps, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
    ):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        return _norm("rms", X + R, W, None, eps), X + R

    def liger_layer_norm(X, W, B, eps):  # type: ignore[no-untyped-def]
        return _norm("layer", X, W, B, eps)

    def rmsnorm(  # type: ignore[no-untyped-def]
        x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False
    ):
        assert prenorm and bias is None
        return _norm("rms", x + residual, weight, None, eps), x + residual

    def flash(kind: str) -> Any:
        def function(x, weight, bias, residual=None, x1=None, eps=1e-6, dropout_p=0.0, prenorm=False):  # type: ignore[no-untyped-def]
            assert prenorm
            return _norm(kind, x + residual, weight, bias, eps), x + residual

        return function

    def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
        residual += input
        input.copy_(_norm("rms", residual, weight, None, eps))

    return {
        "liger": {"liger_fused_add_rms_norm": liger_fused_add_rms_norm, "liger_layer_norm": liger_layer_norm},
        "quack": {"rmsnorm": rmsnorm},
        "flash_attn": {"rms_norm_fn": flash("rms"), "layer_norm_fn": flash("layer")},
        "flashinfer": {"fused_add_rmsnorm": fused_add_rmsnorm},
    }


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("pass_", ["forward", "in-place", "backward"])
def test_peers_are_called_by_their_signatures(name: str, kind: str, pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, content in module(PEERS[name], **_peers()[name]).items():
        monkeypatch.setitem(sys.modules, path, content)
    contest = Contest(Case(5, 64), "float32", kind, pass_, "device")
    peer = next(each for each in TABLE if each.name == name)
    rows, absent = compete(contest, [peer, copy()], gpu.stand_in(), seconds=1e-6)
    if absent:
        assert name in ("quack", "flashinfer") or pass_ == "in-place", absent
        assert "has no" in absent[0].reason
    else:
        assert [(row.contestant, row.within_bounds) for row in rows] == [(name, "yes"), (COPY, "")]


def test_a_peer_that_is_not_there_is_named_with_how_to_get_it() -> None:
    contest = Contest(Case(5, 64), "float32", "rms", "forward", "device")
    for name, path in PEERS.items():
        if not find_spec(path.split(".")[0]):
            peer = next(each for each in TABLE if each.name == name)
            assert "is not installed: pip install" in str(peer.refusal(contest))
