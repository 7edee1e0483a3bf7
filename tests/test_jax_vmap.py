# SPDX-License-Identifier: Apache-2.0
"""A mapped weight or bias in float64 has everything computed in float64, as without vmap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .frameworks import installed

if "jax" not in installed():
    pytest.skip("jax is not installed", allow_module_level=True)

# in a process of its own, because float64 is on or off for the whole of it
PROGRAM = """
import jax, jax.numpy as jnp, normkit_jax
jax.config.update("jax_enable_x64", True)
x = jax.random.normal(jax.random.key(0), (3, 2, 64), jnp.float32)
wide = jax.random.normal(jax.random.key(1), (3, 64), jnp.float64)
narrow = wide[0].astype(jnp.float32)
for rounding in (None, "hf"):
    for of_weight in (True, False):
        def norm(x, wide):
            weight, bias = (wide, None) if of_weight else (narrow, wide)
            options = {"out_dtype": "float64", "rounding": rounding}
            return normkit_jax.add_layer_norm(x, 0.3 * x, weight, bias, **options)[0]
        def gradients(x, wide):
            return jax.grad(lambda x, wide: (norm(x, wide) ** 3).sum(), argnums=(0, 1))(x, wide)
        for function in (norm, gradients):
            mapped = jax.tree.leaves(jax.vmap(function)(x, wide))
            single = jax.tree.leaves(jax.tree.map(lambda *parts: jnp.stack(parts), *map(function, x, wide)))
            for found, expected in zip(mapped, single, strict=True):
                assert found.dtype == expected.dtype
                unit = jnp.finfo(found.dtype).eps
                assert abs(found - expected).max() <= 64 * unit * abs(expected).max(), (rounding, of_weight, function)
print("compared")
"""


def test_a_mapped_float64_weight_or_bias() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, cwd=root)
    assert (done.returncode, done.stdout) == (0, "compared\n"), done.stderr
