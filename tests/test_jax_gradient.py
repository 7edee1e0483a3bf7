# SPDX-License-Identifier: Apache-2.0
"""What the backward pass in JAX leaves out: gradients that nobody asks for, and those that are zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .frameworks import installed

if "jax" not in installed():
    pytest.skip("jax is not installed", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

import normkit_jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """Go through all equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("jitted", [False, True])
def test_the_backward_pass_computes_and_reads_no_more_than_is_asked(kind: str, jitted: bool) -> None:
    function = getattr(normkit_jax, f"add_{kind}_norm")
    function = jax.jit(function) if jitted else function
    rows, parameter = jnp.ones((3, 8)), jnp.ones(8)
    for asks, names in (((0,), {"dx"}), ((1,), {"dx"}), ((2,), {"dweight"}), ((3,), {"dbias"}), ((0, 1, 3), {"dx", "dbias"})):
        for through in ((0,), (1,), (0, 1)):

            def chosen(*given: Any, through: tuple[int, ...] = through) -> Any:
                results = function(*given)
                return sum(results[index].sum() for index in through)

            traced = jax.make_jaxpr(jax.grad(chosen, argnums=asks))(rows, rows, parameter, parameter)
            backward = [eqn.params for eqn in equations(traced.jaxpr) if eqn.primitive.name == "normkit_backward"]
            if through == (1,):
                assert not backward, "the gradient of residual_out goes past the kernel"
            else:
                [params] = backward
                assert {name for name, wanted in params["wanted"]._asdict().items() if wanted} == names
                assert params["has_dresidual_out"] == (1 in through)
