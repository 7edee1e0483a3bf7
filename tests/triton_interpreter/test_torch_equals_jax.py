# SPDX-License-Identifier: Apache-2.0
"""The same kernels give the same bits in PyTorch and in JAX; in JAX also under grad and vmap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

import jax

from ..cases import Case, tagged
from ..frameworks import Jax, Torch

NAMES = (
    "smollm2_135m",
    "llama_3_8b_first_block",
    "gpt_2",
    "olmo_no_weight",
    "gemma_fp32_weight",
    "hidden_1_layer",
    "hidden_257",
    "one_dimension_layer",
    "no_rows",
    "many_small_rows",
    "longer_than_a_backward_block_layer",
    "longer_than_a_block_stored",
    "hf_layer_bf16",
    "residual_narrower",
    "residual_started_in_fp32",
    "out_narrower",
    "bias_only",
)
CASES = [case for case in tagged("ci") if case.name in NAMES]
MAPPED = Case("mapped", "layer", (3, 2, 96), residual="float32", bias="bfloat16")


def bits(array: Any) -> Any:
    """Return the bytes of a NumPy array, so that every NaN is equal to itself and 0 is not equal to -0."""
    return None if array is None else (array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes())


def test_every_case_is_there() -> None:
    assert len(CASES) == len(NAMES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_and_jax_give_the_same_bits(case: Case) -> None:
    found = []
    for framework in (Torch(), Jax()):
        arrays = {name: framework.array(array) for name, array in case.arrays().items()}
        y, residual_out = framework.call(case, arrays, "triton")
        kept, gradients = framework.gradients(case, arrays, "triton")
        made = {"y": y, "residual_out": residual_out, "kept": kept, **gradients}
        found.append({name: bits(framework.numpy(array)) for name, array in made.items()})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert found[1][name] == expected, name


def given(case: Case) -> dict[str, Any]:
    return {name: jax.numpy.asarray(array) for name, array in case.arrays().items() if array is not None}


def results_and_gradients(case: Case, *arrays: Any) -> Any:
    *operands, dy, dresidual_out = arrays

    def function(*operands: Any) -> Any:
        return Jax().call(case, dict(zip(("x", "residual", "weight", "bias"), operands, strict=True)), "triton")

    results, vjp = jax.vjp(function, *operands)
    return (*results, *vjp((dy, dresidual_out)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_rows_that_are_mapped_are_those_of_the_whole(compiled: bool) -> None:
    arrays = list(given(MAPPED).values())
    whole = results_and_gradients(MAPPED, *arrays)
    function: Any = jax.vmap(lambda *a: results_and_gradients(MAPPED, *a), in_axes=(0, 0, None, None, 0, 0))
    mapped = (jax.jit(function) if compiled else function)(*arrays)
    for expected, actual in zip(whole[:4], mapped[:4], strict=True):
        assert bits(np.asarray(actual)) == bits(np.asarray(expected))
    for index in range(3):
        alone = results_and_gradients(MAPPED, *(array[index] if array.ndim > 1 else array for array in arrays))
        for sums, expected in zip(mapped[4:], alone[4:], strict=True):
            assert np.allclose(np.asarray(sums[index], np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=2**-7)


def test_a_weight_that_is_mapped_gives_what_each_weight_gives() -> None:
    arrays = given(MAPPED)
    weights = jax.numpy.stack([arrays["weight"], 2 * arrays["weight"], -arrays["weight"]])
    rows = [arrays[name] for name in ("x", "residual")]
    others = [arrays[name] for name in ("bias", "dy", "dresidual_out")]
    function: Any = jax.vmap(lambda *a: results_and_gradients(MAPPED, *a), in_axes=(None, None, 0, None, None, None))
    mapped = function(*rows, weights, *others)
    for index in range(3):
        alone = results_and_gradients(MAPPED, *rows, weights[index], *others)
        for actual, expected in zip(mapped, alone, strict=True):
            assert np.allclose(np.asarray(actual[index], np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=2**-7)
