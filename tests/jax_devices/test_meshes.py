# SPDX-License-Identifier: Apache-2.0
"""Meshes as programs have them: of some arrays only, uneven, partly manual, abstract; and what goes between devices."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normkit_jax
from normkit.errors import UnsupportedError

from .conftest import IMPLEMENTATION

NOT_TRITON = pytest.mark.skipif(IMPLEMENTATION == "triton", reason="JAX wants one mesh of real devices for these kernels")
CPU_ONLY = pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="of the kernels that find the mesh for themselves")


def mesh_of(axis_type: Any = AxisType.Auto) -> Any:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)


def norm(x: Any, weight: Any) -> Any:
    return normkit_jax.rms_norm(x, weight, implementation=IMPLEMENTATION)


def plain(x: Any, weight: Any) -> Any:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def communication(function: Any, *arrays: Any) -> Counter[tuple[str, str]]:
    """Return what the compiled program sends between devices: operation and type, with how often."""
    text = jax.jit(function).lower(*arrays).compile().as_text() or ""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return Counter((match[2], match[1]) for match in re.finditer(rf"= (\w+\[[\d,]*\])\S* ({names})(?:-start)?\(", text))


@pytest.mark.parametrize("constrained", ["x", "y", "x given sharded", "in a mesh"])
@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_where_not_every_array_has_the_mesh(constrained: str, jitted: bool) -> None:
    mesh = mesh_of()
    spread = NamedSharding(mesh, P("a", None))
    x, weight = normal(8, 16), normal(16)

    def gradients(function: Any) -> Any:
        def loss(x: Any, weight: Any) -> Any:
            constrain: Any = jax.lax.with_sharding_constraint
            x = constrain(x, spread) if constrained in ("x", "in a mesh") else x
            y = function(x, weight)
            return ((constrain(y, spread) if constrained == "y" else y) ** 3).sum()

        gradient: Any = jax.grad(loss, argnums=(0, 1))
        gradient = jax.jit(gradient) if jitted else gradient
        given = jax.device_put(x, spread) if constrained == "x given sharded" else x
        if constrained != "in a mesh":
            return gradient(given, weight)
        with jax.set_mesh(mesh):
            return gradient(given, weight)

    function = norm
    if IMPLEMENTATION == "cpu" and constrained == "y" and jitted:
        with pytest.raises(UnsupportedError, match="no array of this call is in a mesh of them while JAX traces"):
            gradients(norm)
        function = normkit_jax.rms_norm
    for found, expected in zip(gradients(function), gradients(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the rows of normkit's operands")
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("a", "b")], ids=str)
def test_gradients_in_an_explicit_mesh_that_the_weight_lacks(spec: Any) -> None:
    mesh, weight = mesh_of(AxisType.Explicit), normal(16)
    x = jax.device_put(normal(8, 16), NamedSharding(mesh, spec))
    for index in (0, 1):

        def gradient(function: Any, index: int = index) -> Any:
            compiled: Any = jax.jit(jax.grad(lambda x, weight: (function(x, weight) ** 3).sum(), argnums=index))
            return compiled(x, weight)

        np.testing.assert_allclose(gradient(norm), gradient(plain), rtol=1e-4, atol=1e-4)


def test_the_padding_of_rows_that_do_not_divide_evenly_is_not_summed() -> None:
    mesh = mesh_of()
    x, dy, weight = normal(10, 16), normal(10, 16), normal(16)

    def gradient(spec: Any) -> Any:
        def spread(array: Any) -> Any:
            return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

        def loss(weight: Any, x: Any, dy: Any) -> Any:
            return (spread(norm(spread(2 * x + 1), weight)) * spread(2 * dy + 1)).sum()

        compiled: Any = jax.jit(jax.grad(loss))
        return compiled(weight, x, dy)

    np.testing.assert_allclose(gradient(P("a", None)), gradient(P()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("manual", [{"a"}, {"a", "b"}])
def test_shard_map_over_some_axes(manual: set[str]) -> None:
    mesh, x, weight = mesh_of(), normal(16, 64), normal(64)
    mapped = jax.shard_map(norm, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names=manual)
    np.testing.assert_array_equal(jax.jit(mapped)(x, weight), jax.jit(norm)(x, weight))
    assert not communication(mapped, jax.device_put(x, NamedSharding(mesh, P("a"))), weight)


@NOT_TRITON
def test_an_abstract_mesh_and_two_meshes_in_one_program() -> None:
    abstract = NamedSharding(AbstractMesh((8,), ("a",)), P("a"))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=abstract)
    assert jax.jit(normkit_jax.rms_norm).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    one, other = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,)), mesh_of()
    weight = jax.device_put(normal(64), NamedSharding(one, P()))
    rows = jax.device_put(normal(16, 64), NamedSharding(other, P("a", "b")))
    assert jax.jit(normkit_jax.rms_norm)(rows, weight).shape == (16, 64)


@CPU_ONLY
def test_rows_that_another_mesh_spreads_are_gathered_with_a_warning() -> None:
    mesh, other = mesh_of(), jax.make_mesh((2, 4), ("c", "d"), axis_types=(AxisType.Auto,) * 2)
    x, weight = normal(16, 64), normal(64)

    def function(x: Any, weight: Any) -> Any:
        constrain: Any = jax.lax.with_sharding_constraint
        y = norm(2 * x, constrain(2 * weight, NamedSharding(mesh, P())))
        return 2 * constrain(y, NamedSharding(other, P("c")))

    with pytest.warns(UserWarning, match="spread as over another mesh"):
        found = jax.jit(function)(x, weight)
    np.testing.assert_array_equal(found, 2 * norm(2 * x, 2 * weight))


@CPU_ONLY
def test_the_automatic_choice_has_the_kernels_where_the_mesh_is_known(selected: list[str]) -> None:
    mesh = mesh_of()
    given = normal(16, 64), normal(64)
    spread = jax.device_put(given[0], NamedSharding(mesh, P("a")))
    compiled: Any = jax.jit(normkit_jax.rms_norm)
    assert "normkit_cpu_forward" in compiled.lower(spread, given[1]).compile().as_text()
    assert "CustomSPMDPartitioning" not in compiled.lower(*given).as_text()
    np.testing.assert_array_equal(compiled(spread, given[1]), norm(*given))
    np.testing.assert_array_equal(normkit_jax.rms_norm(spread, given[1]), norm(*given))
    assert set(selected) == {"cpu"}
    # too few devices to stand for those of the mesh
    larger = NamedSharding(AbstractMesh((64,), ("a",)), P("a"))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=larger)
    assert "custom_call @normkit" not in compiled.trace(x).lower(lowering_platforms=("cpu",)).as_text()
    assert selected[-1] == "reference"


def test_rows_are_spread_like_those_of_any_operand() -> None:
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x, weight = (jax.device_put(array, NamedSharding(mesh, P())) for array in (normal(8, 16), normal(16)))
        residual = jax.device_put(normal(8, 16), NamedSharding(mesh, P("a")))

        def block(*arrays: Any) -> Any:
            return normkit_jax.add_rms_norm(*arrays, implementation=IMPLEMENTATION)

        y, residual_out = jax.jit(block)(x, residual, weight)
        assert jax.typeof(y).sharding.spec == jax.typeof(residual_out).sharding.spec == P("a", None)
        assert not communication(block, x, residual, weight)


@pytest.mark.parametrize("spec", [P("b"), P("a"), P(("a", "b"))], ids=str)
def test_a_sharded_weight_is_gathered_and_nothing_else(spec: Any) -> None:
    mesh = mesh_of()
    x = jax.device_put(normal(32, 64), NamedSharding(mesh, P("a", None)))
    matrix, weight = normal(64, 128), jax.device_put(normal(128), NamedSharding(mesh, spec))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = communication(lambda x, matrix, weight: norm(x @ matrix, weight), x, matrix, weight)
    if IMPLEMENTATION != "reference":
        assert set(found) == {("all-gather", "f32[128]")}


def test_a_matmul_split_along_the_rows_after_the_norm_gathers_no_rows() -> None:
    mesh = mesh_of()
    x = jax.device_put(normal(32, 128), NamedSharding(mesh, P("a", None)))
    matrix = jax.device_put(normal(128, 256), NamedSharding(mesh, P("b", None)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = communication(lambda x, weight, matrix: norm(2 * x, weight) @ matrix, x, normal(128), matrix)
    assert {name for name, _ in found} <= {"all-reduce"}
