# SPDX-License-Identifier: Apache-2.0
"""Nothing is copied on the way to a vendor's operators and back, from any framework; and nothing is overwritten."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import normkit
import normkit_jax
import normkit_torch

from .vendor import MODULE, NAME, recorded, rows

ADDS = pytest.mark.parametrize("adds", [False, True])


def call(front_end: Any, adds: bool, x: Any, residual: Any, weight: Any) -> Any:
    function = front_end.add_rms_norm if adds else front_end.rms_norm
    results = function(x, *([residual] if adds else []), weight, implementation=NAME)
    return results if adds else (results, None)


def operands(shape: tuple[int, ...] = (6, 64)) -> tuple[Any, Any, Any]:
    return rows(*shape), rows(*shape, seed=1), rows(shape[-1], seed=2)


@ADDS
def test_torch_tensors_are_used_where_they_are(adds: bool) -> None:
    x, residual, weight = map(torch.from_numpy, operands())
    with recorded() as calls:
        results = call(normkit_torch, adds, x, residual, weight)
    [(given, written)] = calls
    assert (given.x.data_ptr(), given.weight.data_ptr()) == (x.data_ptr(), weight.data_ptr())
    for result, where in zip(results, written, strict=True):
        assert (result is None) == (where is None)
        assert result is None or result.data_ptr() == where.data_ptr()


@ADDS
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numpy_arrays_are_used_where_they_are(adds: bool, dtype: str) -> None:
    x, residual, weight = (array.astype(normkit.arrays.numpy_dtype(dtype)) for array in operands())
    verdict = next(v for v in normkit.explain("rms_norm", x, weight) if v.name == NAME)
    if "wrongly" in verdict.reason:
        pytest.skip(verdict.reason)
    with recorded() as calls:
        results = call(normkit, adds, x, residual, weight)
    [(given, written)] = calls
    assert (given.x.data_ptr(), given.weight.data_ptr()) == (x.ctypes.data, weight.ctypes.data)
    for result, where in zip(results, written, strict=True):
        assert result is None or (result.ctypes.data, result.dtype) == (where.data_ptr(), x.dtype)
        assert result is None or result.flags.writeable


def test_numpy_arrays_that_are_read_only_or_strided_are_copied() -> None:
    x, residual, weight = operands((6, 128))
    expected = call(normkit, True, *(np.ascontiguousarray(array[..., ::2]) for array in (x, residual, weight)))
    x.flags.writeable = False
    found = call(normkit, True, x[:, ::2], residual[:, ::2], weight[::2])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_numpy_arrays_that_torch_cannot_hold_are_copied() -> None:
    """Over a negative stride torch ends the process."""
    x, _, weight = operands()
    record = np.zeros(6, [("one byte", "i1"), ("x", np.float32, 64)])
    record["x"] = x
    for given in (x[:, ::-1], x[::-1], x.astype(">f4"), record["x"]):
        found = normkit.rms_norm(given, weight, implementation=NAME)
        np.testing.assert_allclose(found, normkit.rms_norm(given.astype(np.float32), weight), rtol=1e-6, atol=1e-6)


@ADDS
@pytest.mark.parametrize("jitted", [False, True])
def test_jax_buffers_are_used_where_they_are(adds: bool, jitted: bool) -> None:
    x, residual, weight = map(jnp.asarray, operands((2, 3, 64)))
    before = [np.array(array) for array in (x, residual, weight)]
    function = partial(call, normkit_jax, adds)
    with recorded() as calls:
        results = jax.block_until_ready((jax.jit(function) if jitted else function)(x, residual, weight))
    [(given, written)] = calls
    assert given.weight.data_ptr() == weight.unsafe_buffer_pointer()
    if not (adds and NAME == "vllm"):
        assert given.x.data_ptr() == x.unsafe_buffer_pointer()
    for result, where in zip(results, written, strict=True):
        assert result is None or result.unsafe_buffer_pointer() == where.data_ptr()
    for array, value in zip((x, residual, weight), before, strict=True):
        np.testing.assert_array_equal(array, value)


def test_donated_jax_buffers_are_overwritten_without_a_copy() -> None:
    x, residual, weight = map(jnp.asarray, operands())
    expected = call(normkit_jax, True, x, residual, weight)
    pointers = [array.unsafe_buffer_pointer() for array in (x, residual)]
    step = jax.jit(partial(normkit_jax.add_rms_norm_, implementation=NAME), donate_argnums=(0, 1))
    found = jax.block_until_ready(step(x, residual, weight))
    assert [array.unsafe_buffer_pointer() for array in found] == pointers
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_in_place_in_torch() -> None:
    x, residual, weight = map(torch.from_numpy, operands())
    expected = call(normkit_torch, True, x, residual, weight)
    versions = x._version, residual._version
    with recorded() as calls:
        found = normkit_torch.add_rms_norm_(x, residual, weight, implementation=NAME)
    [(_, written)] = calls
    assert found[0] is x and found[1] is residual
    assert [tensor.data_ptr() for tensor in written] == [x.data_ptr(), residual.data_ptr()]
    assert (x._version, residual._version) > versions
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_layer_norm_in_place_and_not() -> None:
    if NAME != "ipex":
        pytest.skip("only IPEX has an add and LayerNorm")
    x, residual = (torch.from_numpy(array).bfloat16() for array in operands()[:2])
    expected = normkit_torch.add_layer_norm(x, residual, implementation="reference")
    for found in (
        normkit_torch.add_layer_norm(x, residual, implementation=NAME),
        normkit_torch.add_layer_norm_(x.clone(), residual.clone(), implementation=NAME),
    ):
        torch.testing.assert_close(found[0], expected[0], rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_vmap_grad_and_shard_map_in_jax() -> None:
    x, residual, weight = map(jnp.asarray, operands((4, 6, 64)))
    expected = normkit_jax.add_rms_norm(x, residual, weight)
    mapped = jax.vmap(partial(call, normkit_jax, True), in_axes=(0, 0, None))(x, residual, weight)
    weights = jax.vmap(partial(call, normkit_jax, True))(x, residual, jnp.broadcast_to(weight, (4, 64)))
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec: Any = jax.sharding.PartitionSpec
    specs: Any = {"in_specs": (spec("a"), spec("a"), spec()), "out_specs": spec("a")}
    sharded = jax.shard_map(partial(call, normkit_jax, True), mesh=mesh, **specs)(x, residual, weight)
    for found in (mapped, weights, sharded):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
    with pytest.raises(normkit.UnsupportedError, match=r"no backward pass, and a gradient is asked for.*take (cpu|reference)"):
        jax.grad(lambda x: call(normkit_jax, True, x, residual, weight)[0].sum())(x)


def test_no_rows() -> None:
    x, residual, weight = operands((0, 64))
    for front_end, array in ((normkit, np.asarray), (normkit_torch, torch.from_numpy), (normkit_jax, jnp.asarray)):
        y, residual_out = call(front_end, True, array(x), array(residual), array(weight))
        assert tuple(y.shape) == tuple(residual_out.shape) == (0, 64)


def test_what_is_not_what_the_problem_says_is_refused() -> None:
    """The guard before the operators themselves, for callers that come past the front ends."""
    x, residual, weight = map(torch.from_numpy, operands())
    problem = normkit_torch.dispatch.problem_of(_call(x, residual, weight), needs_grad=False)
    for wrong in ((x, residual[:2], weight), (x, residual, weight[:8]), (x[0], residual, weight), (x, None, weight)):
        with pytest.raises(normkit.NormkitError, match="the problem has"):
            MODULE.forward(problem, *wrong, None)
    with pytest.raises(normkit.DtypeError, match="the problem has weight of dtype float32"):
        MODULE.forward(problem, x, residual, weight.half(), None)


def _call(x: Any, residual: Any, weight: Any) -> Any:
    return normkit.call.Call("add_rms_norm", x, residual, weight, None, 1e-6, 0.0, None, None, None, None)
