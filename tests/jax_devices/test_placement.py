# SPDX-License-Identifier: Apache-2.0
"""Where arrays are, as a lowering rule is told it by this version of JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normkit_jax
from normkit_jax import launch
from normkit_jax.partition import BY_ROWS, PORTABLE, UNKNOWN, WHOLE, Placement, needs_devices, placement

from .conftest import IMPLEMENTATION

X = jnp.ones((8, 16))
Asked = tuple[Callable[[Any], Any], list[Placement], Primitive]


@pytest.fixture
def asked() -> Iterator[Asked]:
    """A function that returns what it is given, what its lowering found, and its primitive."""
    found: list[Placement] = []
    primitive = Primitive("where")
    primitive.def_abstract_eval(lambda array: array)

    def rule(context: Any, operand: Any) -> list[Any]:
        found.append(placement(context))
        return [operand]

    mlir.register_lowering(primitive, rule)
    yield primitive.bind, found, primitive


def mesh_of(axis_type: Any = AxisType.Auto) -> Any:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)


def sharded(axis_type: Any = AxisType.Auto) -> Any:
    return jax.device_put(X, NamedSharding(mesh_of(axis_type), P("a")))


def mapped(where: Any, **options: Any) -> Any:
    return jax.jit(jax.shard_map(where, mesh=mesh_of(), in_specs=P("a"), out_specs=P("a"), **options))


@pytest.mark.parametrize(
    ("lower", "kind"),
    [
        (lambda where: jax.jit(where).lower(X), WHOLE),
        (lambda where: jax.jit(where).lower(sharded()), BY_ROWS),
        (lambda where: jax.jit(where).lower(sharded(AxisType.Explicit)), BY_ROWS),
        (lambda where: jax.jit(where, out_shardings=NamedSharding(mesh_of(), P("a"))).lower(X), UNKNOWN),
        (lambda where: mapped(where).lower(sharded()), WHOLE),
        (lambda where: mapped(where, axis_names={"a"}).lower(sharded()), WHOLE),
        (lambda where: jax.export.export(jax.jit(where))(X), PORTABLE),
        (lambda where: jax.export.export(jax.jit(where))(sharded()), PORTABLE),
        (lambda where: jax.jit(where).trace(X).lower(lowering_platforms=("cpu", "tpu")), PORTABLE),
    ],
    ids=["one", "spread", "explicit", "out", "shard_map", "partly manual", "exported", "exported spread", "platforms"],
)
def test_the_kind(lower: Callable[[Any], Any], kind: str, asked: Asked) -> None:
    where, found, _ = asked
    lower(partial(where))
    assert [one.kind for one in found] == [kind] * len(found) and found
    if kind == BY_ROWS:
        assert len(found[0].context.module_context.axis_context.device_assignment) == 8


def test_a_primitive_that_needs_devices_has_them_without_a_mesh(asked: Asked) -> None:
    where, found, primitive = asked
    needs_devices(primitive)
    jax.jit(lambda x: where(x), out_shardings=NamedSharding(mesh_of(), P("a"))).lower(X)
    assert [one.kind for one in found] == [BY_ROWS]


@pytest.mark.skipif(IMPLEMENTATION != "reference", reason="once is enough")
def test_a_target_that_is_named_only_for_the_lowering() -> None:
    """JAX then does not tell the devices; the launch is for all rows, which XLA gathers."""
    pytest.importorskip("triton", reason="triton is not installed")
    norm = jax.jit(partial(normkit_jax.rms_norm, eps=0.25), out_shardings=NamedSharding(mesh_of(), P("a")))
    traced = norm.trace(X)
    with normkit_jax.target("sm_90"):
        assert str(traced.lower(lowering_platforms=("cuda",)).as_text()).count(f"@{launch.TARGET}") == 1
