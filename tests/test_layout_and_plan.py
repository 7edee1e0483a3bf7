# SPDX-License-Identifier: Apache-2.0
"""Row strides against a walk over every row, and launch plans for problems of all sizes; no device is needed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.interface import Wanted
from normkit.layout import classify, row_layout
from normkit.plan import BackwardPlan, Step, backward_plan, forward_plan, supports
from normkit.spec import NormSpec, Operand, Problem, describe

RANDOM = settings(derandomize=True, deadline=None, max_examples=300, database=None)
HIDDEN = (1, 2, 3, 31, 64, 100, 255, 256, 1000, 1024, 4096, 5120, 8192, 8193, 16384, 32768, 32769, 65536, 262144, 1048576)
ROWS = (0, 1, 2, 7, 64, 1000, 16384, 131073, 3_000_000)


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """A shape and the strides of one to three arrays of it: views of contiguous ones, permuted, sliced and expanded."""
    shape = (*draw(st.lists(st.integers(1, 4), min_size=0, max_size=4)), draw(st.integers(1, 5)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(shape))))
        if draw(st.booleans()):
            order = sorted(order)
        strides, step = [0] * len(shape), 1
        for axis in reversed(order):
            strides[axis] = draw(st.sampled_from([step, step, step, 0, 2 * step]))
            step *= shape[axis] * draw(st.sampled_from([1, 1, 2]))
        found.append(tuple(strides))
    return shape, found


def _row_starts(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    return [sum(i * s for i, s in zip(index, strides, strict=False)) for index in np.ndindex(shape[:-1])]


@RANDOM
@given(strided())
def test_row_layout_says_where_each_row_starts(case: tuple[tuple[int, ...], list[tuple[int, ...]]]) -> None:
    shape, strides = case
    layout = row_layout(shape, strides)
    assert math.prod(shape[:-1]) % layout.inner_rows == 0
    for own, found in zip(strides, layout.strides, strict=True):
        if found is None:
            continue
        assert own[-1] == 1 or shape[-1] == 1
        starts = [
            (r // layout.inner_rows) * found.outer + (r % layout.inner_rows) * found.inner for r in range(math.prod(shape[:-1]))
        ]
        assert starts == _row_starts(shape, own)


def _reachable(shape: tuple[int, ...], strides: tuple[int, ...], inner_rows: int) -> bool:
    """Whether two numbers exist that say where each row starts."""
    if shape[-1] != 1 and strides[-1] != 1:
        return False
    starts = _row_starts(shape, strides)
    inner = starts[1] - starts[0] if inner_rows > 1 else 0
    outer = starts[inner_rows] - starts[0] if len(starts) > inner_rows else 0
    return all(start == (r // inner_rows) * outer + (r % inner_rows) * inner for r, start in enumerate(starts))


@RANDOM
@given(strided())
def test_row_layout_copies_as_few_arrays_as_any_split_would(case: tuple[tuple[int, ...], list[tuple[int, ...]]]) -> None:
    shape, strides = case
    fewest = min(sum(not _reachable(shape, own, math.prod(shape[split:-1])) for own in strides) for split in range(len(shape)))
    assert row_layout(shape, strides).strides.count(None) <= fewest


@RANDOM
@given(strided())
def test_classify_agrees_with_numpy_and_with_the_walk(case: tuple[tuple[int, ...], list[tuple[int, ...]]]) -> None:
    shape, strides = case
    views = [np.lib.stride_tricks.as_strided(np.empty(10_000, np.int8), shape, own) for own in strides]
    found = classify(shape, strides)
    assert (found == "contiguous") == all(view.flags.c_contiguous for view in views)
    if found == "rows":
        assert None not in row_layout(shape, strides).strides
    if found == "strided":
        assert None in row_layout(shape, strides).strides


def _problem(hidden: int, rows: int, kind: str = "rms", dtype: str = "bfloat16", **facts: object) -> Problem:
    x, affine = Operand((rows, hidden), dtype), Operand((hidden,), dtype)
    return describe(NormSpec(kind), x, x, affine, affine, platform="cuda", arch="sm_90", **facts)  # type: ignore[arg-type]


def _programs(step: Step) -> int:
    return math.prod(step.grid)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "xpu"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_forward_plans_cover_all_rows_and_columns(hidden: int, platform: str) -> None:
    for rows, kind in product(ROWS, ("rms", "layer")):
        x = Operand((rows, hidden), "bfloat16")
        step = forward_plan(describe(NormSpec(kind), x, x, platform=platform))
        block_rows, block = step.constants.get("BLOCK_M", 1), step.constants["BLOCK_N"]
        assert isinstance(block_rows, int) and isinstance(block, int)
        assert block_rows & (block_rows - 1) == 0 and block & (block - 1) == 0, "Triton's blocks are powers of two"
        assert rows <= _programs(step) * block_rows < rows + block_rows
        assert step.kernel == "forward_long" or block >= hidden
        assert step.num_warps & (step.num_warps - 1) == 0 and 1 <= step.num_warps <= (16 if platform == "rocm" else 32)
        assert all(size < 2**31 for size in step.grid[:1]) and all(size < 2**16 for size in step.grid[1:])


@pytest.mark.parametrize("hidden", HIDDEN)
def test_backward_plans_deal_out_all_rows(hidden: int) -> None:
    for rows, wanted in product(
        ROWS, (Wanted(True, True, True, True), Wanted(True, False, False, False), Wanted(False, False, True, False))
    ):
        plan = backward_plan(_problem(hidden, rows), wanted)
        assert isinstance(plan, BackwardPlan)
        assert plan.parts * plan.rows_per_program >= rows and (plan.parts - 1) * plan.rows_per_program < max(rows, 1)
        assert plan.steps or not rows
        for step in (*plan.steps, plan.total):
            assert all(size < 2**31 for size in step.grid[:1]) and all(size < 2**16 for size in step.grid[1:])
        kernels = [step.kernel for step in plan.steps]
        dh = wanted.dx or wanted.dresidual
        assert kernels in (["backward_rows"], ["backward_twice"], ["backward_columns"] + ["backward_long"] * dh)
        assert plan.blocks == (-(-hidden // 512) if "backward_long" in kernels else 0)


@pytest.mark.parametrize(
    ("kind", "weight", "steps"),
    [
        ("layer", "bfloat16", ["backward_twice"]),
        ("layer", "float32", ["backward_columns", "backward_long"]),
        ("rms", "bfloat16", ["backward_columns", "backward_long"]),
    ],
)
def test_two_sums_of_long_rows_take_the_form_that_registers_allow(kind: str, weight: str, steps: list[str]) -> None:
    x, affine = Operand((64, 16384), "bfloat16"), Operand((16384,), weight)
    problem = describe(NormSpec(kind), x, x, affine, affine, platform="cuda", arch="sm_90")
    plan = backward_plan(problem, Wanted(True, True, True, True))
    assert [step.kernel for step in plan.steps] == steps


@pytest.mark.parametrize("hidden", [1024, 4096, 8192, 16384, 65536])
def test_partial_sums_are_a_small_share_unless_parts_are_few(hidden: int) -> None:
    for rows in ROWS[1:]:
        problem = _problem(hidden, rows)
        plan = backward_plan(problem, Wanted(True, True, True, True))
        # weight and bias: two sums of 4 bytes, written and read; dy, h, dresidual_out and dx are 8 bytes
        share = plan.parts * 2 * 2 * 4 / (rows * 8)
        assert share <= 1 / 16 or plan.parts <= 512, (rows, share)
        assert share <= 2 or rows < 512, (rows, share)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_nothing_that_a_row_depends_on_depends_on_the_number_of_rows(hidden: int) -> None:
    everything = Wanted(True, True, True, True)
    for kind in ("rms", "layer"):
        plans = [forward_plan(_problem(hidden, rows, kind)) for rows in ROWS]
        assert len({(step.kernel, tuple(step.constants.items()), step.num_warps) for step in plans}) == 1
        steps = [backward_plan(_problem(hidden, rows, kind), everything).steps for rows in ROWS]
        assert len({tuple((step.kernel, tuple(step.constants.items()), step.num_warps) for step in own) for own in steps}) == 1


def test_what_the_kernels_cannot_compute() -> None:
    assert supports(_problem(64, 4)) is None
    for problem, reason in (
        (_problem(64, 4, dtype="float64"), "float64"),
        (_problem(64, 4, out_dtype="float64"), "float64"),
        (_problem(64, 4, residual_dtype="float64"), "float64"),
        (_problem(2**31, 1), "32 bits"),
        (_problem(64, 4, in_place=True, layout="strided"), "unit stride"),
    ):
        rejected = supports(problem)
        assert rejected is not None and reason in rejected.reason


@pytest.mark.parametrize("hidden", [*HIDDEN, 513, 2049, 40000])
def test_no_launch_on_rocm_has_more_threads_than_hip_counts(hidden: int) -> None:
    accepted, rejected = 1, 2**40
    while rejected - accepted > 1:
        rows = (accepted + rejected) // 2
        reason = supports(replace(_problem(hidden, rows), platform="rocm", arch="gfx942"))
        assert reason is None or "threads" in reason.reason
        accepted, rejected = (rows, rejected) if reason is None else (accepted, rows)
    assert supports(_problem(hidden, rejected)) is None, "CUDA counts programs"
    for kind in ("rms", "layer"):
        problem = replace(_problem(hidden, accepted, kind), platform="rocm", arch="gfx942")
        backward = backward_plan(problem, Wanted(True, True, True, True))
        for step in (forward_plan(problem), *backward.steps, backward.total):
            assert all(64 * step.num_warps * programs < 2**32 for programs in step.grid[:1])
    # 32 GiB of x in bfloat16 at the least
    assert accepted * hidden >= 2**34
