# SPDX-License-Identifier: Apache-2.0
"""Sharded arrays give what whole ones give, and the compiled program communicates no more than the mathematics asks for.

With the kernels of an implementation, or with the reference.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from normkit.tolerance import expected_backward, expected_forward, worst

from ..cases import Case, NumpyArray
from ..frameworks import Jax
from .conftest import IMPLEMENTATION

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
CASES = (
    Case("sharded_rms", "rms", (8, 4, 64), residual="float32", weight_offset=1.0),
    Case("sharded_layer", "layer", (8, 4, 64), x="float32", residual="float32", weight="float32", bias="float32"),
)
ROWS = (P("a"), P(("a", "b")), P("a", "b"), P(None, "b"))
HIDDEN = (P(None, None, "b"), P("a", None, "b"))
NAMES = ("y", "residual_out", "dx", "dresidual", "dweight", "dbias")

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EVERY_AXIS_TYPE = pytest.mark.parametrize(
    ("case", "axis_type"), list(zip(CASES, (AxisType.Explicit, AxisType.Auto), strict=True)), ids=["rms_explicit", "layer_auto"]
)


def given(case: Case) -> dict[str, Any]:
    """Return x, residual, weight and bias, of those that there are, then dy and dresidual_out."""
    return {name: jax.numpy.asarray(array) for name, array in case.arrays().items() if array is not None}


def forward(case: Case, **arrays: Any) -> tuple[Any, Any]:
    operands = dict.fromkeys(("residual", "weight", "bias")) | arrays
    return Jax().call(case, operands, IMPLEMENTATION)


def everything(case: Case, names: tuple[str, ...], *arrays: Any) -> tuple[Any, ...]:
    """Return all results and all gradients."""
    *operands, dy, dresidual_out = arrays
    results, vjp = jax.vjp(lambda *operands: forward(case, **dict(zip(names, operands, strict=False))), *operands)
    return (*results, *vjp((dy, dresidual_out)))


@cache
def whole(case: Case) -> dict[str, NumpyArray]:
    """Return all results and gradients, computed on one device."""
    arrays = given(case)
    results = jax.jit(partial(everything, case, tuple(arrays)))(*arrays.values())
    return named(results)


def named(results: tuple[Any, ...]) -> dict[str, NumpyArray]:
    return {name: np.asarray(array) for name, array in zip(NAMES, results, strict=False)}


def mesh_of(axis_type: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))


def shard(mesh: Any, arrays: dict[str, Any], rows: Any, hidden: Any = None) -> dict[str, Any]:
    """Shard the arrays of rows as `rows` says, and weight and bias as `hidden` does."""
    full = P(*rows, *(None,) * (max(array.ndim for array in arrays.values()) - len(rows)))
    specs = {name: full if array.ndim > 1 else P(hidden) for name, array in arrays.items()}
    return {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in arrays.items()}


def communication(compiled: Any) -> Counter[str]:
    """Count the collective operations in a compiled program."""
    return Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text()))


def check(case: Case, results: tuple[Any, ...], same_rows: bool = True) -> None:
    """Check that results are those of one device: the same bits for rows, within the bounds for sums of rows."""
    arrays, actual = case.arrays(), named(results)
    expected = whole(case)
    h = actual["residual_out"]
    bounds = expected_backward(case.problem(), arrays["dy"], arrays["dresidual_out"], h, arrays["weight"])
    operands = {name: arrays[name] for name in ("x", "residual", "weight", "bias")}
    bounds["y"], bounds["residual_out"] = expected_forward(case.problem(), **operands, residual_out=h)
    for name, array in actual.items():
        assert array.dtype == expected[name].dtype
        assert worst(array, bounds[name]) <= 1, name
        if same_rows and name not in ("dweight", "dbias"):
            assert np.array_equal(array, expected[name]), name


@EVERY_AXIS_TYPE
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_sharded_rows_need_only_the_sum_of_the_weights_gradients(case: Case, rows: Any, axis_type: AxisType) -> None:
    mesh = mesh_of(axis_type)
    arrays = shard(mesh, given(case), rows)
    operands = {name: arrays[name] for name in arrays if not name.startswith("d")}
    with jax.set_mesh(mesh):
        assert not communication(jax.jit(partial(forward, case)).lower(**operands).compile())
        compiled = jax.jit(partial(everything, case, tuple(arrays))).lower(*arrays.values()).compile()
        results = compiled(*arrays.values())
    assert set(communication(compiled)) == {"all-reduce"}
    check(case, results)
    for name, result in zip(NAMES, results, strict=False):
        expected = arrays["x"].sharding if name in NAMES[:4] else arrays["weight"].sharding
        assert result.sharding.is_equivalent_to(expected, result.ndim), name


@EVERY_AXIS_TYPE
@pytest.mark.parametrize("weight", [None, "b"], ids=["whole_weight", "sharded_weight"])
@pytest.mark.parametrize("rows", HIDDEN, ids=str)
def test_sharded_columns_are_gathered_for_kernels(case: Case, rows: Any, weight: str | None, axis_type: AxisType) -> None:
    """The reference adds up its sums over the devices instead, so that its rows are not the same to the bit."""
    mesh = mesh_of(axis_type)
    arrays = shard(mesh, given(case), rows, weight)
    operands = {name: arrays[name] for name in arrays if not name.startswith("d")}
    with jax.set_mesh(mesh), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled_forward = jax.jit(partial(forward, case)).lower(**operands).compile()
        compiled = jax.jit(partial(everything, case, tuple(arrays))).lower(*arrays.values()).compile()
        results = compiled(*arrays.values())
    said = ["they are gathered first, because a norm needs whole rows" in str(warning.message) for warning in caught]
    if IMPLEMENTATION != "reference":
        assert len(said) == 3
        assert all(said)
        assert set(communication(compiled_forward)) == {"all-gather"}
        assert set(communication(compiled)) == {"all-gather"} | ({"all-reduce"} if rows[0] else set())
    else:
        assert said == []
        assert set(communication(compiled_forward)) == {"all-reduce"}
        # in a mesh with explicit axes, the gradient of a whole weight is whole again
        assert set(communication(compiled)) - {"all-gather"} == {"all-reduce"}
    check(case, results, same_rows=IMPLEMENTATION != "reference")


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "unchecked"])
@pytest.mark.parametrize("rows", [P("a"), P("a", "b")], ids=str)
@EVERY_CASE
def test_shard_map(case: Case, rows: Any, check_vma: bool) -> None:
    """Inside of shard_map each device has its rows, and the gradients of what is the same on all of them are added up.

    Unchecked, that is for the caller to do, who gets them rounded already: so the weight is of float32 there.
    """
    case = case if check_vma else replace(case, weight="float32")
    mesh = mesh_of(AxisType.Auto)
    arrays = given(case)
    specs = {name: rows if array.ndim > 1 else P() for name, array in arrays.items()}
    used = tuple(axis for part in rows if part for axis in (part if isinstance(part, tuple) else (part,)))

    def part(*arrays: Any) -> tuple[Any, ...]:
        results = everything(case, tuple(specs), *arrays)
        return results if check_vma else (*results[:4], *(jax.lax.psum(sums, used) for sums in results[4:]))

    parameters = [P() for name in ("weight", "bias") if name in specs]
    mapped = jax.shard_map(
        part, mesh=mesh, in_specs=tuple(specs.values()), out_specs=(*(rows,) * 4, *parameters), check_vma=check_vma
    )
    compiled = jax.jit(mapped).lower(*arrays.values()).compile()
    assert set(communication(compiled)) == {"all-reduce"}
    check(case, compiled(*arrays.values()))


@EVERY_CASE
def test_shard_map_forward_needs_no_communication(case: Case) -> None:
    mesh = mesh_of(AxisType.Auto)
    operands = {name: array for name, array in given(case).items() if not name.startswith("d")}
    specs = tuple(P("a") if array.ndim > 1 else P() for array in operands.values())

    def function(*arrays: Any) -> tuple[Any, Any]:
        return forward(case, **dict(zip(operands, arrays, strict=True)))

    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("a"))
    compiled = jax.jit(mapped).lower(*operands.values()).compile()
    assert not communication(compiled)
    for name, array in named(compiled(*operands.values())).items():
        assert np.array_equal(array, whole(case)[name])


def test_a_gradient_in_a_training_step_of_sharded_rows() -> None:
    """As it is written: jax.grad of a loss, parameters the same on all devices, a batch that is sharded."""
    case = CASES[1]
    arrays = given(case)

    def loss(weight: Any, bias: Any, x: Any, residual: Any) -> Any:
        y, residual_out = forward(case, x=x, residual=residual, weight=weight, bias=bias)
        return (y * arrays["dy"]).sum() + (residual_out * arrays["dresidual_out"]).sum()

    mesh = mesh_of(AxisType.Auto)
    sharded = shard(mesh, arrays, P(("a", "b")))
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    actual = step(*(sharded[name] for name in ("weight", "bias", "x", "residual")))
    dy, dresidual_out = (np.asarray(arrays[name]) for name in ("dy", "dresidual_out"))
    bounds = expected_backward(case.problem(), dy, dresidual_out, whole(case)["residual_out"], case.arrays()["weight"])
    for name, gradient in zip(("dweight", "dbias"), actual, strict=True):
        assert gradient.sharding.is_fully_replicated
        assert worst(np.asarray(gradient), bounds[name]) <= 1
