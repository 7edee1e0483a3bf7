# SPDX-License-Identifier: Apache-2.0
"""What does a prepared call, compiled and in Python, by itself: what it counts, keeps and refuses, and errors within it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor

from normkit import reference, registry
from normkit.call import Arrays, Call
from normkit.cpu import library
from normkit.interface import Guarded
from normkit_torch import add_rms_norm, add_rms_norm_, cpu, dispatch, guarded, prepared, rms_norm
from normkit_torch.implementations import TABLE

from . import stand_in
from .test_prepared import rows

WAYS: dict[str, Callable[[Any], Any]] = {"compiled": cpu.prepare, "in Python": stand_in.prepare}
EACH_WAY = pytest.mark.parametrize("way", WAYS)


def known_of(*tensors: Tensor | None) -> Any:
    """What is known of a call of add_rms_norm."""
    given: Any = (*tensors, *(None,) * (6 - len(tensors)))
    call = Call.of("add_rms_norm", given, (1e-6, 0.0, None, None, None, None))
    return guarded.of_forward(dispatch.problem_of(call, needs_grad=False), given)


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


@pytest.mark.parametrize("way", WAYS)
def test_references_are_counted_right(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "prepare", WAYS[way])
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


def test_where_nothing_is_compiled_for_it_calls_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    without = library.loaded()._replace(prepare=None)
    monkeypatch.setattr(library, "loaded", lambda: without)
    prepared.forget()
    tensors = rows(3, 8), rows(3, 8, seed=1), rows(8)
    for _ in range(2):
        for found, expected in zip(add_rms_norm(*tensors), add_rms_norm(*tensors, implementation="reference"), strict=True):
            torch.testing.assert_close(found, expected)
    assert not prepared._calls


class Module(ModuleType):
    """An implementation with functions of its own, which may be named as an implementation's functions are elsewhere."""

    def __init__(self, **functions: Any) -> None:
        super().__init__("normkit_mine")
        self.supports, self.forward, self.backward = reference.supports, reference.forward, reference.backward
        vars(self).update(functions)


@pytest.mark.parametrize("prepares", [False, True])
def test_an_implementation_of_ones_own(prepares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tensors: Arrays) -> Any:
        return "y", None, None, None, None

    known: list[Guarded] = []

    def prepare(guarded: Guarded) -> Any:
        known.append(guarded)
        return run

    names = ("compute", "runner", "launcher", "backward_runner", "backward_launcher")
    helpers = {name: lambda rows, spec: None for name in names}
    mine = Module(**helpers, **({"prepare": prepare} if prepares else {}))
    name = f"normkit_mine_{prepares}"
    monkeypatch.setitem(sys.modules, name, mine)
    monkeypatch.setattr(dispatch, "TABLE", (registry.Implementation("mine", name), *TABLE))
    prepared.forget()
    x, weight = rows(3, 8), rows(8)
    expected = rms_norm(x, weight, implementation="reference")
    found = [rms_norm(x, weight, implementation="mine") for _ in range(3)]
    assert torch.equal(found[0], expected)
    if prepares:
        assert found[1:] == ["y", "y"]
        assert [(one.problem.shape, one.wanted, one.places) for one in known] == [((3, 8), None, (0, 2))]
    else:
        assert all(torch.equal(one, expected) for one in found)
    prepared.forget()
