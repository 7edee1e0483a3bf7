# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: the same bits however they are reached, by layout, threads, level of instructions or framework."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import normkit
from normkit.cpu import library
from normkit.cpu import numpy as cpu
from normkit.interface import Forward, Gradients, Wanted

from .cpu_operands import COMPILED, DTYPES, KINDS, LOADED, Given, assert_same_bits, operands, problem_of

pytestmark = COMPILED
# dtypes of x, residual, weight, bias, residual_out
MIXTURES = (
    *((dtype,) * 5 for dtype in DTYPES),
    ("bfloat16", "float32", "bfloat16", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "float32", None, "bfloat16"),
    ("float16", "bfloat16", None, "float32", "bfloat16"),
    ("float32", "bfloat16", "float16", "float32", "float16"),
    ("bfloat16", None, "bfloat16", None, None),
)
MIXED = pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda dtypes: "-".join(str(dtype) for dtype in dtypes))


def both_ways(kind: str, given: Given, dtypes: tuple[str | None, ...], rounding: str | None = None) -> tuple[Any, ...]:
    """Forward with statistics, then backward."""
    problem = problem_of(kind, given, dtypes[4], rounding, needs_grad=True)
    forward = cpu.forward(problem, *given)
    h = given[0] if forward.residual_out is None else forward.residual_out
    dresidual_out = h[::-1].copy()
    gradients = cpu.backward(
        problem, Wanted.by(problem), forward.y[::-1].copy(), dresidual_out, h, given[2], forward.mean, forward.rstd
    )
    return (*forward, *gradients)


@KINDS
@MIXED
@pytest.mark.parametrize("hidden", [1, 31, 64, 1000, 20001])
def test_torch_and_numpy_have_the_same_bits(kind: str, dtypes: tuple[str | None, ...], hidden: int) -> None:
    torch = pytest.importorskip("torch")
    from normkit_torch import cpu as torch_cpu

    from .frameworks import Torch

    given = operands(7, hidden, dtypes)
    problem = problem_of(kind, given, dtypes[4], needs_grad=True)
    expected = both_ways(kind, given, dtypes)
    there = Torch()
    forward: Forward = torch_cpu.forward(problem, *(there.array(array) for array in given))
    h = there.array(given[0]) if forward.residual_out is None else forward.residual_out
    dy, dresidual_out = torch.flip(forward.y, (0,)), torch.flip(h, (0,))
    weight = there.array(given[2])
    gradients: Gradients = torch_cpu.backward(
        problem, Wanted.by(problem), dy, dresidual_out, h, weight, forward.mean, forward.rstd
    )
    assert_same_bits([there.numpy(tensor) for tensor in (*forward, *gradients)], expected)


@KINDS
@MIXED
@pytest.mark.parametrize("hidden", [33, 4096])
def test_a_row_alone_has_the_bits_that_it_has_among_others(kind: str, dtypes: tuple[str | None, ...], hidden: int) -> None:
    x, residual, weight, bias = operands(4096 if hidden < 100 else 200, hidden, dtypes)
    together = cpu.forward(problem_of(kind, (x, residual, weight, bias), dtypes[4]), x, residual, weight, bias)
    for row in (0, 1, 97, len(x) - 1):
        given = x[row : row + 1], None if residual is None else residual[row : row + 1], weight, bias
        alone = cpu.forward(problem_of(kind, given, dtypes[4]), *given)
        assert_same_bits(alone, [None if one is None else one[row : row + 1] for one in together])


@KINDS
@MIXED
@pytest.mark.parametrize("rounding", ["sum", "stored", "hf"])
@pytest.mark.parametrize("shape", [(300, 513), (1, 32768), (3, 40001)], ids=str)
def test_the_number_of_threads_changes_no_bit(
    kind: str, dtypes: tuple[str | None, ...], rounding: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads deal with the rows, or share a long one where there are more threads than rows."""
    given = operands(*shape, dtypes)
    found = []
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(cpu, "threads", lambda threads=threads: threads)
        found.append(both_ways(kind, given, dtypes, rounding))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@KINDS
@MIXED
@pytest.mark.parametrize("rounding", ["sum", "stored", "hf"])
@pytest.mark.parametrize("hidden", [5, 96, 1030])
def test_every_level_of_instructions_has_the_same_bits(
    kind: str, dtypes: tuple[str | None, ...], rounding: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(LOADED, library.Library)
    given = operands(40, hidden, dtypes)
    found = []
    original_forward, original_backward = library.forward, library.backward
    for level in LOADED.levels:
        monkeypatch.setattr(library, "forward", partial(original_forward, level=level))
        monkeypatch.setattr(library, "backward", partial(original_backward, level=level))
        found.append(both_ways(kind, given, dtypes, rounding))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@KINDS
@MIXED
@pytest.mark.parametrize("hidden", [4101, 4104])
def test_results_that_are_written_past_the_caches_have_the_bits_of_small_ones(
    kind: str, dtypes: tuple[str | None, ...], hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 16 MiB of results on, if all rows are aligned to 16 bytes; those of 4104 begin at several places of a cache line."""
    assert isinstance(LOADED, library.Library)
    rows, part = 2100, 300
    given = operands(rows, hidden, dtypes)
    x, residual, weight, bias = given
    problem = problem_of(kind, given, dtypes[4], needs_grad=True)
    expected: Forward | None = None
    original = library.forward
    for level in LOADED.levels:
        monkeypatch.setattr(library, "forward", partial(original, level=level))
        together = cpu.forward(problem, *given)
        if expected is None:
            expected = together
            for first in range(0, rows, part):
                own = slice(first, first + part)
                few = x[own], None if residual is None else residual[own], weight, bias
                alone = cpu.forward(problem_of(kind, few, dtypes[4], needs_grad=True), *few)
                assert_same_bits([None if one is None else one[own] for one in together], alone)
        assert_same_bits(together, expected)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 100), (2, 3, 4096)])
def test_in_place_has_the_bits_of_the_functional_form(kind: str, dtype: str, shape: tuple[int, ...]) -> None:
    hidden = shape[-1]
    x, residual, weight, bias = operands(6, hidden, (dtype,) * 4)
    # rows that lie apart: every other one of a longer array, and a part of wider rows
    apart = np.repeat(x, 2, axis=0).reshape(*shape[:-1], 2 * hidden)[..., :hidden]
    wider = np.concatenate([residual, residual], axis=1).reshape(*shape[:-1], 2 * hidden)[..., hidden:]
    given = x.reshape(shape), residual.reshape(shape), weight, bias
    problem = problem_of(kind, given)
    expected = cpu.forward(problem, *given)
    in_place = replace(problem, in_place=True)
    for one, other in ((given[0].copy(), given[1].copy()), (apart.copy(), wider), (apart, given[1].copy())):
        one[...], other[...] = given[:2]
        cpu.forward_into(in_place, one, other, weight, bias, Forward(one, other, None, None))
        assert_same_bits((np.ascontiguousarray(one), np.ascontiguousarray(other)), expected[:2])


def test_strides_bytes_and_alignment_of_any_kind() -> None:
    x, residual, weight, bias = operands(6, 50, ("float32",) * 4)
    expected = normkit.add_layer_norm(x, residual, weight, bias, implementation="cpu")
    odd = np.empty(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    odd[...] = x
    records = np.zeros(6, np.dtype([("a", "u1"), ("x", "f4", (50,))]))
    records["x"] = x
    views: tuple[Any, ...] = (odd, records["x"], np.asfortranarray(x), x[::-1].copy()[::-1], x.astype(">f4"))
    for view in views:
        found = normkit.add_layer_norm(view, residual, weight[::-1].copy()[::-1], bias.astype(">f4"), implementation="cpu")
        assert_same_bits(found, expected)


def test_no_rows() -> None:
    given = operands(0, 16, ("float32",) * 4)
    *_, dweight, dbias = both_ways("layer", given, ("float32",) * 5)
    assert not dweight.any() and not dbias.any()
