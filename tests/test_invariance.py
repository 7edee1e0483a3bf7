# SPDX-License-Identifier: Apache-2.0
"""Bits: a row's do not depend on the other rows, a gradient's are repeatable, and those of the frameworks agree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from normkit.arrays import numpy_dtype
from normkit.tolerance import expected_forward, worst

from .cases import Case, NumpyArray
from .frameworks import Framework, installed, step_by_step

FRAMEWORKS = installed()
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
SIZES = ((1, 65), (3, 65), (8, 64), (64, 64), (100, 64), (255, 33), (1000, 17), (4096, 5), (40000, 5), (65536, 3))
Run = Callable[..., tuple[NumpyArray, ...]]


def _ways() -> list[Any]:
    """Every framework that computes in another way: NumPy, torch, JAX at once and JAX compiled."""
    ways = [pytest.param(framework, False, id=framework.name) for framework in FRAMEWORKS.values()]
    return ways + ([pytest.param(FRAMEWORKS["jax"], True, id="jax-jit")] if "jax" in FRAMEWORKS else [])


EACH_WAY = pytest.mark.parametrize(("framework", "jit"), _ways())


def forward(framework: Framework, jit: bool, kind: str, **options: Any) -> Run:
    """Return a function from NumPy arrays to y and residual_out."""
    function = getattr(framework.front_end, f"add_{kind}_norm")

    def call(*arrays: Any) -> Any:
        return function(*arrays, **options)

    if jit:
        import jax

        call = jax.jit(call)

    def run(*arrays: NumpyArray | None) -> tuple[NumpyArray, ...]:
        with nullcontext() if jit else step_by_step(framework):
            return _numpy(framework, call(*map(framework.array, arrays)))

    return run


def backward(framework: Framework, jit: bool, kind: str) -> Run:
    """Return a function from x, residual, weight, bias, dy and dresidual_out to all gradients."""
    function = getattr(framework.front_end, f"add_{kind}_norm")

    def pull(*arrays: Any) -> Any:
        import jax

        return jax.vjp(function, *arrays[:4])[1](arrays[4:])

    if framework.name == "jax":
        import jax

        call = jax.jit(pull) if jit else pull

        def run_jax(*arrays: NumpyArray) -> tuple[NumpyArray, ...]:
            with nullcontext() if jit else step_by_step(framework):
                return _numpy(framework, call(*map(framework.array, arrays)))

        return run_jax

    def run(*arrays: NumpyArray) -> tuple[NumpyArray, ...]:
        import torch

        leaves = [framework.array(array).requires_grad_() for array in arrays[:4]]
        return _numpy(
            framework, torch.autograd.grad(function(*leaves), leaves, [framework.array(array) for array in arrays[4:]])
        )

    return run


def _numpy(framework: Framework, arrays: Any) -> tuple[NumpyArray, ...]:
    return tuple(np.asarray(framework.numpy(array)) for array in arrays)


def operands(rows: int, hidden: int, dtype: str = "float32") -> tuple[NumpyArray, ...]:
    """Return x, residual, weight, bias, dy and dresidual_out."""
    rng = np.random.default_rng([rows, hidden])
    shapes = [(rows, hidden)] * 2 + [(hidden,)] * 2 + [(rows, hidden)] * 2
    return tuple((0.3 + rng.standard_normal(shape)).astype(numpy_dtype(dtype)) for shape in shapes)


def _same_bits_in_any_batch(run: Run, given: tuple[NumpyArray, ...], results: int) -> None:
    rows = given[0].shape[0]
    whole = run(*given)
    for part in [slice(row, row + 1) for row in range(rows)] + [slice(0, rows // 2 or 1), slice(rows // 3, rows)]:
        some = run(*(array[part] if array.ndim == 2 else array for array in given))
        for name, one, all_rows in zip(("first", "second"), some[:results], whole[:results], strict=True):
            different = np.any(one != all_rows[part], axis=-1).sum()
            assert not different, f"{name} result: {different} of rows {part.start} to {part.stop - 1} have other bits"


@KINDS
@pytest.mark.parametrize(("hidden", "rows"), SIZES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(kind: str, hidden: int, rows: int) -> None:
    """The reference in torch and JAX leaves the order of a sum to the framework, which may depend on the number of rows."""
    _same_bits_in_any_batch(forward(FRAMEWORKS["numpy"], False, kind), operands(rows, hidden)[:4], results=2)


@EACH_WAY
@KINDS
def test_leading_dimensions_do_not_change_a_bit(framework: Framework, jit: bool, kind: str) -> None:
    x, residual, weight, bias, *_ = operands(24, 100)
    run = forward(framework, jit, kind)
    flat = run(x, residual, weight, bias)
    for shape in ((2, 3, 4, 100), (24, 1, 100), (1, 24, 100), (4, 6, 100)):
        for result, expected in zip(run(x.reshape(shape), residual.reshape(shape), weight, bias), flat, strict=True):
            np.testing.assert_array_equal(result.reshape(24, 100), expected)


def test_torch_bits_do_not_depend_on_the_number_of_threads() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 4):
                given = operands(rows, 65536)
                results.append((rows, forward(FRAMEWORKS["torch"], False, "layer")(*given[:4])))
    finally:
        torch.set_num_threads(before)
    for rows, found in results:
        for result, expected in zip(found, next(first for other, first in results if other == rows), strict=True):
            np.testing.assert_array_equal(result, expected)


@EACH_WAY
@KINDS
@pytest.mark.parametrize(("rows", "hidden"), [(1000, 33), (64, 1000), (3, 40000)])
def test_gradients_are_repeatable_bit_for_bit(framework: Framework, jit: bool, kind: str, rows: int, hidden: int) -> None:
    if framework.name == "numpy":
        return
    run, given = backward(framework, jit, kind), operands(rows, hidden)
    first = run(*given)
    for _ in range(3):
        for result, expected in zip(run(*given), first, strict=True):
            np.testing.assert_array_equal(result, expected)


@EACH_WAY
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ["sum", "stored", "hf"])
def test_where_sums_are_exact_every_framework_has_the_same_bits(
    framework: Framework, jit: bool, kind: str, dtype: str, rounding: str
) -> None:
    """Small integers in rows of a power of two, of mean 0: no order of summation rounds, so that all else must agree."""
    rng = np.random.default_rng(5)
    for hidden in (1, 2, 64, 1024):
        rows = [rng.integers(-8, 9, (7, hidden)) for _ in range(2)]
        if hidden > 1:
            rows = [np.concatenate([row[:, : hidden // 2], -row[:, hidden // 2 - 1 :: -1]], axis=1) for row in rows]
        given = [
            array.astype(numpy_dtype(dtype)) for array in (*rows, rng.integers(-8, 9, hidden) / 7, rng.integers(-8, 9, hidden))
        ]
        expected = forward(FRAMEWORKS["numpy"], False, kind, rounding=rounding)(*given)
        found = forward(framework, jit, kind, rounding=rounding)(*given)
        np.testing.assert_array_equal(found[1], expected[1])
        if jit and dtype == "float32":
            # XLA contracts a product and a sum into one operation that rounds once
            np.testing.assert_allclose(found[0], expected[0], rtol=2e-6, atol=2e-6)
        else:
            np.testing.assert_array_equal(found[0], expected[0])


@EACH_WAY
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_residual_out_has_the_same_bits_in_every_framework(framework: Framework, jit: bool, kind: str, dtype: str) -> None:
    for hidden in (1, 7, 100, 1000):
        given = operands(9, hidden, dtype)[:4]
        expected = (given[0].astype(np.float32) + given[1].astype(np.float32)).astype(given[0].dtype)
        np.testing.assert_array_equal(forward(framework, jit, kind)(*given)[1], expected)


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_where_sums_round_the_frameworks_agree_within_the_bounds(kind: str, dtype: str) -> None:
    """Summation order is each framework's own: results may differ by what both may differ from the exact one."""
    case = Case("agreement", kind, (6, 1000), x=dtype, residual=dtype, weight=dtype, bias=dtype)
    names = ("x", "residual", "weight", "bias")
    given = [case.arrays()[name] for name in names]
    for way in _ways():
        framework, jit = way.values
        y, residual_out = forward(framework, jit, kind, eps=case.eps)(*given)
        expected, _ = expected_forward(case.problem(), *given[:2], *given[2:], residual_out=residual_out)
        assert worst(y, expected) <= 1
