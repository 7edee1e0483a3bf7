# SPDX-License-Identifier: Apache-2.0
"""What the JAX functions take for an array, and what they refuse by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from normkit import DtypeError

from .frameworks import installed

if "jax" not in installed():
    pytest.skip("jax is not installed", allow_module_level=True)

import jax
import jax.numpy as jnp

import normkit_jax


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_float64_needs_to_be_enabled() -> None:
    x = np.ones((3, 8))
    options: dict[str, Any]
    for options in ({"out_dtype": "float64"}, {"residual_dtype": jnp.float64}):
        for call in (normkit_jax.add_rms_norm, partial(normkit_jax.explain, "add_rms_norm")):
            with pytest.raises(DtypeError, match=rf"^{next(iter(options))}='float64' .*jax_enable_x64"):
                call(x, x, **options)
    with jax.enable_x64(True):
        y = normkit_jax.rms_norm(x * [1, 2, 3, 4, 5, 6, 7, 8])
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(np.mean(np.square(y), -1), 1.0, rtol=1e-6)


def test_without_float64_numpys_arrays_are_what_they_are_under_jit() -> None:
    x, weight = np.random.default_rng(0).standard_normal((3, 8)), np.linspace(0.5, 2, 8)
    found, expected = normkit_jax.add_rms_norm(x, x, weight), jax.jit(normkit_jax.add_rms_norm)(x, x, weight)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)


def test_numpys_arrays_are_differentiated() -> None:
    x, weight = (np.asarray(array) for array in (normal(3, 8), normal(8)))
    _, vjp = jax.vjp(normkit_jax.rms_norm, x, weight)
    _, expected = jax.vjp(normkit_jax.rms_norm, jnp.asarray(x), jnp.asarray(weight))
    for one, other in zip(vjp(jnp.asarray(x)), expected(jnp.asarray(x)), strict=True):
        np.testing.assert_array_equal(one, other)


class Parameter:
    """A parameter as libraries have them."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __jax_array__(self) -> Any:
        return self.value


def test_what_has_a_jax_array_is_one() -> None:
    x, residual, weight = (normal(3, 8), normal(3, 8, seed=1), normal(8))
    expected = normkit_jax.add_rms_norm(x, residual, weight)
    for function in (normkit_jax.add_rms_norm, lambda *given: jax.jit(lambda: normkit_jax.add_rms_norm(*given))()):
        for one, other in zip(function(Parameter(x), Parameter(residual), Parameter(weight)), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert normkit_jax.add_rms_norm(Parameter(x), None)[1] is x
    gradient = jax.grad(lambda weight: (normkit_jax.rms_norm(x, Parameter(weight)) ** 2).sum())(weight)
    np.testing.assert_array_equal(gradient, jax.grad(lambda weight: (normkit_jax.rms_norm(x, weight) ** 2).sum())(weight))
    with pytest.raises(DtypeError, match=r"^weight must be a JAX or NumPy array .*, got list"):
        normkit_jax.rms_norm(x, Parameter([1.0] * 8))


def test_what_is_no_array_is_named() -> None:
    x = np.ones((3, 8), np.float32)
    for thing in ([1.0] * 8, (1.0,) * 8, 1.0, np.float32(1), "weight"):
        for name in ("residual", "bias"):
            with pytest.raises(
                DtypeError, match=rf"^{name} must be a JAX or NumPy array \(jax\.numpy\.asarray makes one\), got "
            ):
                normkit_jax.add_rms_norm(**{"x": x, "residual": x, name: thing})  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match=r"^weight must be one of float32, .*, got object$"):
        normkit_jax.rms_norm(x, np.array([None] * 8))


def test_a_parameter_of_flax() -> None:
    nnx = pytest.importorskip("flax.nnx")
    x, weight = normal(3, 8), normal(8)
    for given in ((nnx.Param(x), weight), (x, nnx.Param(weight))):
        np.testing.assert_array_equal(normkit_jax.rms_norm(*given), normkit_jax.rms_norm(x, weight))
