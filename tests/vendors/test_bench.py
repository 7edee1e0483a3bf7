# SPDX-License-Identifier: Apache-2.0
"""`normkit bench` with the vendor's operator: it computes rightly in every pass that it has, and in place it works in place."""

from __future__ import annotations

import pytest

from normkit.bench.compete import compete
from normkit.bench.contest import Case, Contest
from normkit.bench.contestants import TABLE, copy
from normkit.bench.device import processor

from .vendor import NAME

CONTESTANT = next(each for each in TABLE if each.name == NAME)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("pass_", ["forward", "in-place", "backward"])
def test_the_operator_competes(kind: str, pass_: str) -> None:
    contest = Contest(Case(5, 64), "float32", kind, pass_)
    rows, absent = compete(contest, [CONTESTANT, copy()], processor(), seconds=1e-6)
    if pass_ == "backward" or (NAME, kind) == ("vllm", "layer"):
        assert "has no LayerNorm" in absent[0].reason or "no backward pass" in absent[0].reason
    else:
        assert [(row.contestant, row.within_bounds) for row in rows] == [(NAME, "yes"), ("copy", "")]


def test_in_place_the_residual_is_overwritten() -> None:
    contest = Contest(Case(5, 64), "float32", "rms", "in-place")
    program = CONTESTANT.program(contest)
    arrays = contest.arrays(0)
    tensors = program.put(arrays)
    program.ready(tensors)()
    assert tensors.residual.numpy() == pytest.approx(arrays.x + arrays.residual)
