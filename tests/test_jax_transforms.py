# SPDX-License-Identifier: Apache-2.0
"""The functions under every transformation of JAX: jit, grad, vmap, scan, map, checkpoint, shardings, ahead-of-time."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normkit import NormSpec

from .frameworks import installed

if "jax" not in installed():
    pytest.skip("jax is not installed", allow_module_level=True)

import jax
import jax.numpy as jnp

import normkit_jax
from normkit_jax import FastRMSNorm
from normkit_jax.pallas import norm_rows

ROOT = Path(__file__).parent.parent
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def operands(hidden: int = 8, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Return x, residual, weight and bias."""
    shapes = [(3, hidden)] * 2 + [(hidden,)] * 2
    return tuple(normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))


def by_hand(kind: str, x: Any, residual: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """The same in jax.numpy, which JAX differentiates by itself."""
    h = x if residual is None else x + residual
    centred = h if kind == "rms" else h - h.mean(-1, keepdims=True)
    eps = {"rms": 1e-6, "layer": 1e-5}[kind]
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias, h


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Assert that two trees agree but for the rounding of a few operations in float32."""
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance), found, expected)


@KINDS
@pytest.mark.parametrize("without_residual", [False, True])
def test_jit_grad_and_value_and_grad(kind: str, without_residual: bool) -> None:
    function = getattr(normkit_jax, f"add_{kind}_norm")
    x, residual, weight, bias = operands()
    dy, dresidual_out = normal(3, 8, seed=5), normal(3, 8, seed=6)

    def loss(function: Any) -> Any:
        def value(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
            y, residual_out = function(x, None if without_residual else residual, weight, bias)
            return (y * dy).sum() + (residual_out * dresidual_out).sum()

        return value

    expected = jax.value_and_grad(loss(lambda *given: by_hand(kind, *given)), argnums=(0, 1, 2, 3))(x, residual, weight, bias)
    for wrap in (lambda f: f, jax.jit):
        found = wrap(jax.value_and_grad(loss(function), argnums=(0, 1, 2, 3)))(x, residual, weight, bias)
        close(found, expected)
        close(wrap(jax.grad(loss(function), argnums=2))(x, residual, weight, bias), expected[1][2])


@KINDS
@pytest.mark.parametrize(
    "axes",
    [(0, 0, None, None), (0, None, None, None), (None, None, 0, None), (1, 2, 0, 1), (None, 0, None, 0), (0, 0, 0, 0)],
    ids=str,
)
def test_vmap(kind: str, axes: tuple[int | None, ...]) -> None:
    function = getattr(normkit_jax, f"add_{kind}_norm")
    given = []
    for seed, (shape, axis) in enumerate(zip([(3, 8), (3, 8), (8,), (8,)], axes, strict=True)):
        batched = list(shape)
        if axis is not None:
            batched.insert(axis, 4)
        given.append(normal(*batched, seed=seed))
    dy = normal(3, 8, seed=9)

    def gradients(*operands: jax.Array) -> Any:
        return jax.vjp(function, *operands)[1]((dy, 2 * dy))

    for mapped in (function, gradients):
        found = jax.vmap(mapped, in_axes=axes)(*given)
        for index in range(4):
            one = [a if axis is None else jnp.take(a, index, axis) for a, axis in zip(given, axes, strict=True)]
            close(jax.tree.map(lambda array, index=index: array[index], found), mapped(*one))


@KINDS
def test_nested_vmap(kind: str) -> None:
    function = getattr(normkit_jax, f"{kind}_norm")
    x, weight = normal(5, 4, 3, 8), normal(4, 8)
    found = jax.vmap(jax.vmap(function, in_axes=(0, 0)), in_axes=(0, None))(x, weight)
    for outer in range(5):
        for inner in range(4):
            close(found[outer, inner], function(x[outer, inner], weight[inner]))


@KINDS
def test_scan_over_layers(kind: str) -> None:
    function = getattr(normkit_jax, f"add_{kind}_norm")
    x, weights, dy = normal(3, 8), normal(4, 8, seed=1), normal(3, 8, seed=2)

    def scanned(function: Any, weights: Any, x: Any) -> Any:
        def layer(carry: Any, weight: Any) -> Any:
            hidden, stream = carry
            normed, stream = function(hidden, stream, weight, jnp.zeros(8))
            return (jnp.tanh(normed), stream), None

        (hidden, stream), _ = jax.lax.scan(layer, (x, jnp.zeros_like(x)), weights)
        return (hidden * dy).sum() + (stream * dy).sum()

    expected = jax.grad(scanned, argnums=(1, 2))(lambda *given: by_hand(kind, *given), weights, x)
    for wrapped in (function, jax.checkpoint(function)):
        close(jax.jit(jax.grad(lambda *given, f=wrapped: scanned(f, *given), argnums=(0, 1)))(weights, x), expected, 1e-4)


@KINDS
def test_map_and_while(kind: str) -> None:
    function = getattr(normkit_jax, f"{kind}_norm")
    x, weight = normal(5, 3, 8), normal(8)
    close(jax.lax.map(lambda rows: function(rows, weight), x), function(x, weight))
    found = jax.lax.fori_loop(0, 3, lambda _, rows: function(rows, weight), x)
    close(found, function(function(function(x, weight), weight), weight))


@KINDS
def test_checkpoint(kind: str) -> None:
    function = getattr(normkit_jax, f"add_{kind}_norm")
    dy = normal(3, 8, seed=5), normal(3, 8, seed=6)
    expected = jax.vjp(function, *operands())[1](dy)
    for policy in (None, jax.checkpoint_policies.dots_saveable):
        close(jax.vjp(jax.checkpoint(function, policy=policy), *operands())[1](dy), expected)


@KINDS
def test_second_derivatives(kind: str) -> None:
    x, residual, weight, bias = operands(hidden=4)
    dy = normal(3, 4, seed=5)

    def loss(function: Any) -> Any:
        return lambda *given: (function(*given)[0] * dy).sum() + (function(*given)[1] ** 3).sum()

    ours = loss(getattr(normkit_jax, f"add_{kind}_norm"))
    theirs = loss(lambda *given: by_hand(kind, *given))
    given = (x, residual, weight, bias)

    def twice(value: Any) -> Any:
        return jax.grad(lambda *g: sum((part**2).sum() for part in jax.grad(value, argnums=(0, 1, 2))(*g)), argnums=(0, 2))

    close(twice(ours)(*given), twice(theirs)(*given), 2e-3)
    close(jax.jacrev(jax.grad(ours))(*given), jax.jacrev(jax.grad(theirs))(*given), 2e-3)


def test_forward_mode_says_what_jax_says_of_custom_vjp() -> None:
    """JAX itself refuses forward mode through a custom_vjp: better an error than a wrong derivative."""
    x, *_ = operands()
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(normkit_jax.rms_norm, (x,), (x,))
    plain = partial(norm_rows, spec=NormSpec("rms", eps=1e-6))
    close(jax.jacfwd(plain)(x), jax.jacrev(normkit_jax.rms_norm)(x))


@KINDS
def test_ahead_of_time_and_no_callback(kind: str) -> None:
    function = getattr(normkit_jax, f"add_{kind}_norm")
    lowered = jax.jit(function).lower(*operands())
    assert "callback" not in lowered.as_text()
    close(lowered.compile()(*operands()), function(*operands()))

    def gradients(*given: Any) -> Any:
        return jax.vjp(function, *given)[1]((given[0], given[0]))

    for traced in (function, gradients):
        assert "callback" not in str(jax.make_jaxpr(traced)(*operands()))
    shapes = jax.eval_shape(lambda: operands(dtype=jnp.bfloat16))
    y, residual_out = jax.eval_shape(lambda *given: function(*given, out_dtype=jnp.float32), *shapes)
    assert (y.shape, y.dtype, residual_out.dtype) == ((3, 8), jnp.float32, jnp.bfloat16)


@KINDS
def test_donated_inputs(kind: str) -> None:
    function = getattr(normkit_jax, f"add_{kind}_norm")
    expected = function(*operands())
    x, residual, weight, bias = operands()
    found = jax.jit(function, donate_argnums=(0, 1))(x, residual, weight, bias)
    close(found, expected)
    assert x.is_deleted() and residual.is_deleted() and not weight.is_deleted()


def test_numpy_arrays_are_accepted_and_left_alone() -> None:
    x, residual, weight, _ = (np.array(array) for array in operands())
    before = x.copy()
    for found, expected in zip(
        normkit_jax.add_rms_norm(x, residual, weight), normkit_jax.add_rms_norm(*operands()[:3]), strict=True
    ):
        assert isinstance(found, jax.Array)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(x, before)
    gradient = jax.grad(lambda weight: (normkit_jax.rms_norm(x, weight) ** 2).sum())(weight)
    assert gradient.shape == (8,)


@KINDS
def test_no_cache_grows_and_nothing_is_traced_again(kind: str) -> None:
    traces = []

    @jax.jit
    def step(x: jax.Array, weight: jax.Array) -> Any:
        traces.append(1)
        return getattr(normkit_jax, f"add_{kind}_norm")(x, x, weight)

    for seed in range(4):
        step(normal(3, 8, seed=seed), normal(8, seed=seed))
    assert len(traces) == 1


ON_FOUR_DEVICES = """
import functools, numpy as np, jax, jax.numpy as jnp, normkit_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()), ("rows",))
rng = np.random.default_rng(0)
x, residual, dy, dh = (jnp.asarray(rng.standard_normal((8, 16)), jnp.float32) for _ in range(4))
weight, bias = (jnp.asarray(rng.standard_normal(16), jnp.float32) for _ in range(2))
over_rows, everywhere = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
for function in (normkit_jax.add_rms_norm, normkit_jax.add_layer_norm):
    def gradients(x, residual, weight, bias, dy, dh):
        results, vjp = jax.vjp(function, x, residual, weight, bias)
        return results, vjp((dy, dh))
    given = (x, residual, weight, bias, dy, dh)
    expected = gradients(*given)
    sharded = [jax.device_put(a, over_rows if a.ndim == 2 else everywhere) for a in given]
    (y, h), (dx, dresidual, dweight, dbias) = jax.jit(gradients)(*sharded)
    for array in (y, h, dx, dresidual):
        assert array.sharding.is_equivalent_to(over_rows, 2), array.sharding
    assert "all-gather" not in jax.jit(gradients).lower(*sharded).compile().as_text()
    y_eager, h_eager = function(*sharded[:4])
    assert y_eager.sharding.is_equivalent_to(over_rows, 2)
    specs = (P("rows"), P("rows"), P(), P())
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P("rows"), P("rows"))))
    def mapped_gradients(x, residual, weight, bias, dy, dh):
        results, vjp = jax.vjp(mapped, x, residual, weight, bias)
        return results, vjp((dy, dh))
    for found in (((y, h), (dx, dresidual, dweight, dbias)), mapped_gradients(*sharded)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    columns = [jax.device_put(a, NamedSharding(mesh, P(*(None,) * (a.ndim - 1), "rows"))) for a in given]
    found = jax.jit(gradients)(*columns)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
"""


def test_shardings_over_four_devices() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", ON_FOUR_DEVICES], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_module_under_scan_and_vmap() -> None:
    norms = FastRMSNorm(normal(4, 8))
    x = normal(4, 3, 8, seed=1)
    found, _ = jax.vmap(lambda norm, rows: norm(rows))(norms, x)
    for index in range(4):
        close(found[index], FastRMSNorm(norms.weight[index])(x[index])[0])
    (stream, _), _ = jax.lax.scan(lambda carry, norm: (norm(*carry), None), (x[0], x[1]), norms)
    assert stream.shape == (3, 8)
