# SPDX-License-Identifier: Apache-2.0
"""What the backward pass in JAX leaves out: gradients that nobody asks for, and those that are zero."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from .frameworks import installed

if "jax" not in installed():
    pytest.skip("jax is not installed", allow_module_level=True)

import jax
import jax.numpy as jnp

import normkit_jax
from normkit import OptionError

from .jax_gpu.decoder import messages


def plain(x: Any, residual: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    h = x + residual
    return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6) * weight + bias, h


@pytest.mark.parametrize("wrap", ["plain", "jit", "jit inlined", "checkpoint"])
def test_what_was_asked_before_makes_no_difference(wrap: str) -> None:
    wraps: dict[str, Any] = {"jit": jax.jit, "jit inlined": partial(jax.jit, inline=True), "checkpoint": jax.checkpoint}
    function = wraps.get(wrap, lambda function: function)(normkit_jax.add_rms_norm)
    operands = [jnp.arange(1.0, 25.0).reshape(3, 8)] * 2 + [jnp.arange(1.0, 9.0)] * 2
    for asks in ((0,), (2,), (3,), (0, 1, 3), (1, 2), (0,), (2,)):
        for through in ((0,), (1,), (0, 1), (0,)):

            def loss(function: Any, *given: Any, through: tuple[int, ...] = through) -> Any:
                results = function(*given)
                return sum((results[index] ** 2).sum() for index in through)

            found = jax.grad(partial(loss, function), argnums=asks)(*operands)
            expected = jax.grad(partial(loss, plain), argnums=asks)(*operands)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


ROWS = "normkit_backward_rows"
TOTAL = "normkit_sum_partials"


@pytest.mark.parametrize(
    ("asks", "launches"),
    [
        ((0,), [ROWS]),
        ((1,), [ROWS]),
        ((2,), [ROWS, TOTAL]),
        ((0, 1, 3), [ROWS, TOTAL]),
        ((0, 2, 3), [ROWS, TOTAL, TOTAL]),
    ],
    ids=str,
)
@pytest.mark.parametrize("wrap", ["plain", "jit", "scan", "checkpoint"])
def test_a_compiled_backward_pass_computes_no_more_than_is_asked(wrap: str, asks: tuple[int, ...], launches: list[str]) -> None:
    pytest.importorskip("triton")

    def loss(*operands: Any) -> Any:
        wraps: dict[str, Any] = {"jit": jax.jit, "checkpoint": jax.checkpoint}
        function = wraps.get(wrap, lambda function: function)(normkit_jax.add_layer_norm)
        if wrap != "scan":
            return sum((result**2).sum() for result in function(*operands))
        x, residual, weight, bias = operands
        (y, stream), _ = jax.lax.scan(lambda carry, _: (function(*carry, weight, bias), None), (x, residual), None, length=3)
        return (y**2).sum() + stream.sum()

    operands = [jax.ShapeDtypeStruct((3, 8), jnp.float32)] * 2 + [jax.ShapeDtypeStruct((8,), jnp.float32)] * 2
    gradient: Any = jax.jit(jax.grad(loss, argnums=asks))
    with normkit_jax.target("sm_90"):
        text = gradient.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    names = [message.name for message, _ in messages(text)]
    assert [name for name in names if name != "normkit_forward_rows"] == launches


@pytest.mark.parametrize("name", ["eps", "weight_offset"])
def test_an_option_that_is_traced_is_refused_with_what_works(name: str) -> None:
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    with pytest.raises(
        OptionError, match=rf"{name} must be a Python number that is known while JAX traces.*static_argnames='{name}'"
    ):
        jax.jit(normkit_jax.rms_norm)(x, weight, **{name: 0.5})
    compiled = jax.jit(normkit_jax.rms_norm, static_argnames=name)
    np.testing.assert_array_equal(compiled(x, weight, **{name: 0.5}), normkit_jax.rms_norm(x, weight, **{name: 0.5}))  # type: ignore[arg-type]
