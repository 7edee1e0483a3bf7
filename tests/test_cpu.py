# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: the same bits however they are reached, and the conversions and special values of every dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import normkit
from normkit import reference
from normkit.arrays import numpy_dtype
from normkit.cpu import build, library
from normkit.cpu import numpy as cpu
from normkit.interface import Forward, Gradients, Wanted
from normkit.spec import NormSpec, Operand, Problem, describe

LOADED = library.load()
pytestmark = pytest.mark.skipif(isinstance(LOADED, library.Missing), reason="the CPU kernels are not compiled")
DTYPES = ("float32", "bfloat16", "float16")
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
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
Given = tuple[Any, Any, Any, Any]


def operands(rows: int, hidden: int, dtypes: tuple[str | None, ...], seed: int = 0) -> Given:
    """Random x, residual, weight and bias."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, hidden), (rows, hidden), (hidden,), (hidden,))
    x, residual, weight, bias = (
        None if dtype is None else rng.standard_normal(shape).astype(numpy_dtype(dtype))
        for shape, dtype in zip(shapes, dtypes, strict=False)
    )
    return x, residual, weight, bias


def problem_of(
    kind: str, given: Given, residual_dtype: str | None = None, rounding: str | None = None, **facts: Any
) -> Problem:
    """Describe a call of NumPy arrays."""
    x, residual, weight, bias = (None if array is None else Operand(array.shape, array.dtype.name) for array in given)
    assert x is not None
    return describe(NormSpec(kind, 1e-6, 0.0, rounding), x, residual, weight, bias, residual_dtype=residual_dtype, **facts)


def assert_same_bits(found: Any, expected: Any) -> None:
    """Compare results one by one."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), index
        if one is not None:
            kind = f"u{one.itemsize}"
            np.testing.assert_array_equal(np.asarray(one).view(kind), np.asarray(other).view(kind), err_msg=str(index))


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
def test_the_number_of_threads_changes_no_bit(
    kind: str, dtypes: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands(300, 513, dtypes)
    found = []
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(cpu, "threads", lambda threads=threads: threads)
        found.append(both_ways(kind, given, dtypes))
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
        cpu.forward_(in_place, one, other, weight, bias)
        assert_same_bits((np.ascontiguousarray(one), np.ascontiguousarray(other)), expected[:2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_is_widened_exactly(dtype: str) -> None:
    assert isinstance(LOADED, library.Library)
    x = np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(64, 1024)
    given = (x, None, None, None)
    for level in LOADED.levels:
        residual_out = residual_out_at(level, problem_of("rms", given, "float32"), given)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(residual_out, x.astype(np.float32))
            np.testing.assert_array_equal(np.signbit(residual_out), np.signbit(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_float32_near_a_number_of_16_bits_is_rounded_to_nearest_even(dtype: str) -> None:
    """All numbers of 16 bits, the middle between each and the next, and the neighbours of both."""
    assert isinstance(LOADED, library.Library)
    narrow = np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype))
    with np.errstate(all="ignore"):
        wide = narrow.astype(np.float32)
        middle = ((wide.astype(np.float64) + np.roll(wide, -1).astype(np.float64)) / 2).astype(np.float32)
    bits = np.concatenate([array.view(np.uint32) + np.uint32(step) for array in (wide, middle) for step in (0, 1, 2**32 - 1)])
    x = np.concatenate([bits, np.random.default_rng(0).integers(0, 2**32, 65536, dtype=np.uint32)]).view(np.float32)
    x = x.reshape(-1, 1024)
    given = (x, None, None, None)
    with np.errstate(all="ignore"):
        expected = x.astype(numpy_dtype(dtype))
    for level in LOADED.levels:
        found = residual_out_at(level, problem_of("rms", given, dtype), given)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), ~number)
        np.testing.assert_array_equal(found.view(np.uint16)[number], expected.view(np.uint16)[number])


def test_every_sum_of_bfloat16_is_rounded_to_nearest_even() -> None:
    """x and residual of bfloat16 have a path of their own: every x with residuals of very different size."""
    assert isinstance(LOADED, library.Library)
    rng = np.random.default_rng(1)
    x = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(64, 1024)
    with np.errstate(all="ignore"):
        residuals = np.zeros_like(x), rng.permutation(x.ravel()).reshape(x.shape), x * ml_dtypes.bfloat16(0.0039)
    for residual in residuals:
        given = (x, residual, None, None)
        with np.errstate(all="ignore"):
            expected = (x.astype(np.float32) + residual.astype(np.float32)).astype(ml_dtypes.bfloat16)
        for level in LOADED.levels:
            found = residual_out_at(level, problem_of("rms", given), given)
            number = ~np.isnan(expected)
            np.testing.assert_array_equal(np.isnan(found), ~number)
            np.testing.assert_array_equal(found.view(np.uint16)[number], expected.view(np.uint16)[number])


def residual_out_at(level: int, problem: Problem, given: Given) -> Any:
    """residual_out, computed with the instructions of one level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "forward", partial(library.forward, level=level))
        return cpu.forward(problem, *given).residual_out


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 1e-40, 6e-8])
@pytest.mark.parametrize("place", [0, 37, 99])
def test_nan_infinity_and_subnormals_do_as_in_the_reference(kind: str, dtype: str, special: float, place: int) -> None:
    given = operands(3, 100, (dtype,) * 4)
    given[0][1, place] = special
    given[1][1, place] = special
    problem = problem_of(kind, given)
    with np.errstate(all="ignore"):
        expected, found = reference.forward(problem, *given), cpu.forward(problem, *given)
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2e-2, atol=2e-2)


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


def test_a_child_process_computes_too() -> None:
    code = (
        "import os, numpy as np, normkit\n"
        "x = np.ones((512, 512), np.float32)\n"
        "normkit.rms_norm(x, implementation='cpu')\n"
        "child = os.fork()\n"
        "normkit.rms_norm(x, implementation='cpu')\n"
        "os._exit(0) if child == 0 else print(os.waitpid(child, 0)[1])\n"
    )
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, **options)
    assert done.stdout.strip() == "0"


def test_without_a_compiler_the_build_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    with pytest.raises(build.BuildError, match="no-such-compiler not found"):
        build.build(library=tmp_path / "kernels.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match=r"false .* failed"):
        build.build(library=tmp_path / "kernels.so")


def test_without_kernels_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "kernels.so")
    missing = library.load.__wrapped__()
    assert isinstance(missing, library.Missing)
    assert "not compiled" in missing.reason
    (tmp_path / "kernels.so").write_bytes(b"no library")
    broken = library.load.__wrapped__()
    assert isinstance(broken, library.Missing)
    assert "cannot be loaded" in broken.reason
    monkeypatch.setattr(library, "load", lambda: missing)
    rejected = library.supports(problem_of("rms", operands(2, 8, ("float32",) * 4)))
    assert rejected and "python -m normkit.cpu.build" in rejected.reason
