# SPDX-License-Identifier: Apache-2.0
"""Kernels that cannot be compiled, of sharded arrays: while a program is lowered, or only while XLA partitions it."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normkit_jax
from normkit import compile
from normkit_jax import launch

from ..jax_failure import kernels_on_the_cpu
from .conftest import IMPLEMENTATION

pytest.importorskip("triton", reason="triton is not installed")
if IMPLEMENTATION != "reference":
    pytest.skip("once is enough", allow_module_level=True)


@pytest.mark.parametrize("compiled_first", [0, 3])
def test_the_next_implementation_computes_each_device_s_rows(compiled_first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_step(step: Any, *given: Any) -> Any:
        if len(compiled) >= compiled_first:
            raise RuntimeError("no C compiler")
        compiled.append(step.kernel)
        return compile.compile_step(step, *given)

    def gradients(x: Any, weight: Any, implementation: str | None = None) -> Any:
        results, vjp = jax.vjp(lambda *given: normkit_jax.rms_norm(*given, implementation=implementation), x, weight)
        return results, vjp(x)

    mesh = jax.make_mesh((8,), ("rows",))
    x = jax.device_put(
        jnp.asarray(np.random.default_rng(0).standard_normal((16, 48)), jnp.float32), NamedSharding(mesh, P("rows"))
    )
    weight = jnp.linspace(0.5, 2, 48)
    monkeypatch.setattr(launch, "compile_step", compile_step)
    monkeypatch.setattr(launch._failures, "_reasons", {})
    jax.clear_caches()
    with kernels_on_the_cpu(), pytest.warns(RuntimeWarning, match="computed by reference from now on, not by triton") as said:
        found = jax.jit(gradients)(x, weight)
    assert len(said) == 1 and len(compiled) == compiled_first
    expected = jax.jit(gradients, static_argnums=2)(x, weight, "reference")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    with kernels_on_the_cpu(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        jax.clear_caches()
        jax.jit(gradients)(x, weight)
    jax.clear_caches()
