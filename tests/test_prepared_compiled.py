# SPDX-License-Identifier: Apache-2.0
"""What does a prepared call, compiled and in Python, by itself: what it counts, keeps and refuses, and errors within it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor

from normkit.call import Arrays, Call
from normkit_torch import add_rms_norm, add_rms_norm_, cpu, dispatch, guarded, prepared, rms_norm

from .test_prepared import rows

WAYS: dict[str, Callable[[Any], Any]] = {
    "compiled": cpu.runner,
    "in Python": lambda known: guarded.in_python(known, cpu.launcher(known.problem, torch.device("cpu"))),
}
EACH_WAY = pytest.mark.parametrize("way", WAYS)


def known_of(*tensors: Tensor | None) -> Any:
    """What is known of a call of add_rms_norm."""
    given: Any = (*tensors, *(None,) * (6 - len(tensors)))
    call = Call.of("add_rms_norm", given, (1e-6, 0.0, None, None, None, None))
    return prepared._guarded(dispatch.problem_of(call, needs_grad=False), given)


@EACH_WAY
def test_what_is_computed(way: str) -> None:
    x, residual, weight = rows(3, 8), rows(3, 8, seed=1), rows(8)
    known = known_of(x, residual, weight)
    y, residual_out, mean, rstd, problem = WAYS[way](known)((x, residual, weight, None, None, None))
    assert (mean, rstd, problem) == (None, None, known.problem)
    for found, expected in zip((y, residual_out), add_rms_norm(x, residual, weight), strict=True):
        assert torch.equal(found, expected)


@EACH_WAY
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize(
    "stranger", [None, [1.0], 7, torch.ones(3, 9), torch.ones(3, 8).double()], ids=["none", "list", "int", "shape", "dtype"]
)
def test_others_are_not_computed(way: str, place: int, stranger: Any) -> None:
    tensors: list[Any] = [rows(3, 8), rows(3, 8), rows(8), rows(8), rows(3, 8), rows(3, 8)]
    run = WAYS[way](known_of(*tensors))
    assert run(tuple(tensors)) is not None
    tensors[place] = stranger
    assert run(tuple(tensors)) is None


@EACH_WAY
@pytest.mark.parametrize("part", ["fits", "make", "address_of", "count_as_written"])
def test_errors_within_go_through(way: str, part: str) -> None:
    tensors: Arrays = (rows(3, 8), rows(3, 8), rows(8), None, rows(3, 8), None)

    def broken(*_: Any) -> Any:
        raise KeyError(part)

    run = WAYS[way](replace(known_of(*tensors), **{part: (broken,) if part == "make" else broken}))
    for _ in range(3):
        with pytest.raises(KeyError, match=part):
            run(tensors)


def test_the_launches_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are few for all calls together, and none is another call's."""
    monkeypatch.setattr(guarded, "_MOST_BOUND", 4)
    bound_to: list[tuple[str, int]] = []

    def bind_of(name: str, pointers: tuple[int, ...]) -> Callable[[], None]:
        bound_to.append((name, pointers[4]))
        return lambda: None

    prepared.forget()
    x, outs = rows(3, 8), [rows(3, 8) for _ in range(5)]
    others = x.clone(), x.clone()
    runs = {
        name: guarded.in_python(known_of(x, x.clone(), None, None, outs[0], x.clone()), partial(bind_of, name)) for name in "ab"
    }

    def run(name: str, *places: int) -> list[tuple[str, int]]:
        bound_to.clear()
        for place in places:
            assert runs[name]((x, others[0], None, None, outs[place], others[1])) is not None
        return bound_to

    def at(name: str, *places: int) -> list[tuple[str, int]]:
        return [(name, outs[place].data_ptr()) for place in places]

    assert run("a", 0, 1, 2, 0, 1, 2) == at("a", 0, 1, 2)
    assert run("b", 0, 0) == at("b", 0)
    assert run("b", 4, 0) == at("b", 4, 0)
    assert run("a", 0, 0) == at("a", 0)
    prepared.forget()
    assert run("a", 0) == at("a", 0)


@pytest.mark.parametrize("way", WAYS)
def test_references_are_counted_right(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "runner", WAYS[way])
    prepared.forget()
    x, residual, weight = rows(3, 8), rows(3, 8), rows(8)

    def calls() -> None:
        add_rms_norm(x, residual, weight)
        rms_norm(x, weight)
        add_rms_norm_(residual, x)
        add_rms_norm(x, x, weight)

    calls()
    shared = (x, residual, weight, None, True, False)
    before = [sys.getrefcount(each) for each in shared]
    for _ in range(1000):
        calls()
    changed = [sys.getrefcount(each) - count for each, count in zip(shared, before, strict=True)]
    assert max(map(abs, changed)) < 500
