# SPDX-License-Identifier: Apache-2.0
"""The callback from JAX's programs on the CPU, by both ways: errors come back, and addresses do not leave the process."""

from __future__ import annotations

import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import normkit_jax
import normkit_torch
from normkit.vendors import custom_call

from .vendor import MODULE, NAME, rows

COMPILED = pytest.mark.skipif(custom_call.target() is None, reason="the compiled library is not there")
WAYS = pytest.mark.parametrize("native", [pytest.param(True, marks=COMPILED), False], ids=["custom call", "buffer_callback"])


def step() -> Any:
    return jax.jit(partial(normkit_jax.add_rms_norm, implementation=NAME))


def way(native: bool) -> Any:
    return patch.object(custom_call, "target", custom_call.target if native else lambda: None)


@WAYS
@pytest.mark.parametrize("text", ["no such weight ä", "long " * 1000])
def test_an_error_of_the_operator_comes_back_with_its_message(native: bool, text: str) -> None:
    arrays = [jnp.asarray(array) for array in (rows(5, 64), rows(5, 64, seed=1), rows(64, seed=2))]

    def failing(spec: Any, given: Any, out: Any) -> Any:
        raise ValueError(text)

    expected = normkit_jax.add_rms_norm(*arrays, implementation="reference")
    with way(native), patch.object(MODULE, "compute", failing), patch.object(MODULE.rounding, "refusal", lambda *_: None):
        failing_step = step()
        for _ in range(2):
            with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError: " + text[:14]):
                jax.block_until_ready(failing_step(*arrays))
    with way(native):
        for one, other in zip(step()(*arrays), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@WAYS
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64)])
def test_rows_of_any_rank(native: bool, shape: tuple[int, ...]) -> None:
    arrays = [jnp.asarray(array) for array in (rows(*shape), rows(*shape, seed=1), rows(64, seed=2))]
    with way(native):
        compiled = step()
        assert ("normkit_callback" in compiled.lower(*arrays).as_text()) == native
        found = compiled(*arrays)
    for one, other in zip(found, normkit_jax.add_rms_norm(*arrays, implementation="reference"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@WAYS
def test_a_callback_may_use_jax(native: bool) -> None:
    x = jnp.asarray(rows(5, 64))
    compute = MODULE.compute

    def nested(spec: Any, given: Any, out: Any) -> Any:
        assert float(jax.jit(jnp.sum)(jnp.ones((300, 300)))) == 90000
        return compute(spec, given, out)

    with way(native), patch.object(MODULE, "compute", nested):
        y = jax.jit(lambda x: normkit_jax.rms_norm(jnp.sin(x @ x.T @ x), implementation=NAME) + 1)(x)
    expected = normkit_jax.rms_norm(jnp.sin(x @ x.T @ x), implementation="reference") + 1
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@COMPILED
def test_tensors_made_in_a_mode_of_torch_are_as_good_outside() -> None:
    arrays = [jnp.asarray(array) for array in (rows(7, 64), rows(7, 64, seed=1), rows(64, seed=2))]
    compiled = step()
    with torch.inference_mode(), torch.device("meta"):
        expected = [np.array(result) for result in compiled(*arrays)]
    for _ in range(3):
        for one, other in zip(compiled(*arrays), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@COMPILED
def test_what_is_made_of_few_addresses_is_kept() -> None:
    memory, made = np.zeros((1000, 2, 8), np.int16), []

    def given(*tensors: Any) -> Any:
        made.append(tensors)
        return tensors

    arguments: Any = custom_call.arguments_at(
        given, [custom_call.Buffer("bfloat16", (2, 8)), custom_call.Buffer("int16", (8,))]
    )
    addresses = [struct.pack("2P", row.ctypes.data, row[1].ctypes.data) for row in memory]
    assert [arguments(each) for each in addresses] == made
    assert arguments(addresses[-1]) is made[-1]
    assert [(tensor.dtype, tensor.shape) for tensor in made[-1]] == [(torch.bfloat16, (2, 8)), (torch.int16, (8,))]
    made[-1][0].fill_(1)
    assert np.count_nonzero(memory) == 16 and memory[-1].all() and made[-1][1].all()
    assert (len(made), arguments.cache_info().currsize) == (1000, custom_call._KEPT)


@COMPILED
def test_no_other_process_has_the_name_of_the_custom_call() -> None:
    """A program from JAX's cache would hold an address of the process that made it."""
    code = "from normkit.vendors import custom_call\nprint(custom_call.target())"
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], **options)
    assert done.stdout.strip().startswith("normkit_callback_") and done.stdout.strip() != custom_call.target()


@COMPILED
def test_a_function_that_does_not_run_to_its_end_is_an_error() -> None:
    """As when a signal comes before it: ctypes then prints the exception and leaves the result as it is."""

    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def failing(spec: Any, given: Any, out: Any) -> Any:
        raise Unspeakable

    arrays = [jnp.asarray(array) for array in (rows(7, 64), rows(7, 64, seed=1), rows(64, seed=2))]
    seen: list[Any] = []
    with (
        patch.object(sys, "unraisablehook", seen.append),
        patch.object(MODULE, "compute", failing),
        patch.object(MODULE.rounding, "refusal", lambda *_: None),
        pytest.raises(jax.errors.JaxRuntimeError, match="was interrupted"),
    ):
        jax.block_until_ready(step()(*arrays))
    assert len(seen) == 1


@COMPILED
def test_subnormal_numbers_are_what_they_are_in_torch() -> None:
    x, residual = np.full((2, 64), 1e-39, np.float32), np.full((2, 64), 2e-39, np.float32)
    found = step()(jnp.asarray(x), jnp.asarray(residual))
    expected = normkit_torch.add_rms_norm(torch.from_numpy(x), torch.from_numpy(residual), implementation=NAME)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), other.numpy())
    assert np.asarray(found[1]).all()
