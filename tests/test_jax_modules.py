# SPDX-License-Identifier: Apache-2.0
"""The JAX modules: pytrees with static options, loaded from any kind of weights."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normkit import MappingWeights, MissingTensorError, NormkitError, OptionError, SafetensorsWeights

from .frameworks import installed

if "jax" not in installed():
    pytest.skip("jax is not installed", allow_module_level=True)

import jax
import jax.numpy as jnp

import normkit_jax
from normkit_jax import FastLayerNorm, FastRMSNorm


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def tensors() -> dict[str, Any]:
    return {"norm.weight": normal(16), "norm.bias": normal(16, seed=1), "other.weight": normal(8)}


class Foreign:
    """A checkpoint as inference servers have them."""

    def get_tensor(self, name: str) -> Any:
        if name not in tensors():
            raise RuntimeError(f"weight {name} does not exist")
        return jnp.asarray(tensors()[name])


@pytest.fixture(params=["dict", "mapping", "foreign", "numpy files", "jax files"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param.endswith("files"):
        save = pytest.importorskip("safetensors.numpy")
        save.save_file(tensors(), tmp_path / "model.safetensors")
        return SafetensorsWeights(tmp_path, framework=request.param.split()[0])
    return {"dict": tensors(), "mapping": MappingWeights(tensors()), "foreign": Foreign()}[request.param]


def test_load(weights: Any) -> None:
    rms = FastRMSNorm.load("norm", weights, eps=1e-5)
    layer = FastLayerNorm.load("norm", weights, eps=1e-3)
    no_bias = FastLayerNorm.load_no_bias("norm", weights, eps=1e-3)
    assert FastRMSNorm.load("norm", weights).eps == 1e-6
    assert (rms.eps, layer.eps, no_bias.eps) == (1e-5, 1e-3, 1e-3)
    assert no_bias.bias is None
    for norm in (rms, layer, no_bias):
        assert isinstance(norm.weight, jax.Array)
        np.testing.assert_array_equal(norm.weight, tensors()["norm.weight"])
    assert layer.bias is not None
    np.testing.assert_array_equal(layer.bias, tensors()["norm.bias"])


def test_a_missing_tensor_is_named() -> None:
    for load in (FastRMSNorm.load, FastLayerNorm.load, FastLayerNorm.load_no_bias):
        with pytest.raises(MissingTensorError, match=r"'nrm\.weight'.*'norm\.weight'"):
            load("nrm", tensors(), 1e-5)
        with pytest.raises(RuntimeError, match=r"weight nrm\.weight does not exist"):
            load("nrm", Foreign(), 1e-5)
        with pytest.raises(NormkitError, match="NoneType"):
            load("norm", None, 1e-5)  # type: ignore[arg-type]
    with pytest.raises(MissingTensorError, match=r"'other\.bias'"):
        FastLayerNorm.load("other", tensors(), 1e-5)


@pytest.mark.parametrize("with_residual", [False, True])
def test_call(with_residual: bool) -> None:
    hidden, stream = jnp.asarray(normal(3, 16)), jnp.asarray(normal(3, 16, seed=2)) if with_residual else None
    rms = FastRMSNorm.load("norm", tensors(), 1e-2, weight_offset=1.0, rounding="hf")
    layer = FastLayerNorm.load("norm", tensors(), 1e-2, rounding="stored")
    no_bias = FastLayerNorm.load_no_bias("norm", tensors(), 1e-2)
    for norm, expected in (
        (rms, normkit_jax.add_rms_norm(hidden, stream, rms.weight, eps=1e-2, weight_offset=1.0, rounding="hf")),
        (layer, normkit_jax.add_layer_norm(hidden, stream, layer.weight, layer.bias, eps=1e-2, rounding="stored")),
        (no_bias, normkit_jax.add_layer_norm(hidden, stream, layer.weight, eps=1e-2)),
        (FastLayerNorm(None, eps=1e-2), normkit_jax.add_layer_norm(hidden, stream, eps=1e-2)),
    ):
        found = norm(hidden) if stream is None else norm(hidden, stream)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert (found[1] is hidden) == (stream is None)


def test_the_bias_is_used() -> None:
    layer, no_bias = FastLayerNorm.load("norm", tensors(), 1e-5), FastLayerNorm.load_no_bias("norm", tensors(), 1e-5)
    difference = layer(normal(3, 16))[0] - no_bias(normal(3, 16))[0]
    np.testing.assert_allclose(difference, np.broadcast_to(tensors()["norm.bias"], (3, 16)), rtol=1e-5, atol=1e-6)


def test_leaves_are_arrays_and_options_are_static() -> None:
    rms, layer = FastRMSNorm(jnp.ones(4), 1e-5), FastLayerNorm(jnp.ones(4), jnp.zeros(4), 1e-5)
    assert len(jax.tree.leaves(rms)) == 1 and len(jax.tree.leaves(layer)) == 2
    assert len(jax.tree.leaves(FastLayerNorm(jnp.ones(4)))) == 1
    halved = jax.tree.map(lambda array: array / 2, rms)
    assert type(halved) is FastRMSNorm and halved.eps == 1e-5 and halved.weight[0] == 0.5
    norms = (rms, FastRMSNorm(jnp.zeros(4), 1e-5), FastRMSNorm(jnp.ones(4), 1e-6))
    structures: list[Any] = [jax.tree_util.tree_structure(norm) for norm in norms]
    assert structures[0] == structures[1] and structures[0] != structures[2]
    (path, _), *_ = jax.tree_util.tree_leaves_with_path(rms)
    assert jax.tree_util.keystr(path) == ".weight"
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), layer)
    assert half(jnp.ones((2, 4), jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_as_an_argument_of_jit() -> None:
    traces = []

    @jax.jit
    def step(norm: FastRMSNorm, hidden: jax.Array) -> Any:
        traces.append(norm.eps)
        return norm(hidden, hidden)

    hidden = jnp.asarray(normal(3, 16))
    for eps in (1e-5, 1e-2):
        for seed in (0, 1):
            norm = FastRMSNorm(jnp.asarray(normal(16, seed=seed)), eps)
            for found, expected in zip(step(norm, hidden), norm(hidden, hidden), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert traces == [1e-5, 1e-2], "another weight is no reason to compile again, another eps is"


def test_gradient_with_respect_to_the_module_and_one_step_of_training() -> None:
    hidden, target = jnp.asarray(normal(5, 16)), jnp.asarray(normal(5, 16, seed=1))

    def loss(norm: Any) -> jax.Array:
        return jnp.mean((norm(hidden, hidden)[0] - target) ** 2)

    for norm in (FastRMSNorm.load("norm", tensors()), FastLayerNorm.load("norm", tensors(), 1e-5)):
        before, gradient = jax.jit(jax.value_and_grad(loss))(norm)
        assert type(gradient) is type(norm) and gradient.eps == norm.eps
        stepped = jax.tree.map(lambda weight, slope: weight - 0.5 * slope, norm, gradient)
        assert loss(stepped) < before
        assert all(np.any(one != other) for one, other in zip(jax.tree.leaves(stepped), jax.tree.leaves(norm), strict=True))


def test_copies_pickles_and_replace() -> None:
    norm = FastRMSNorm.load("norm", tensors(), rounding="hf")
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), dataclasses.replace(norm, eps=1e-6)):
        assert again.rounding == "hf"
        np.testing.assert_array_equal(again(normal(3, 16))[0], norm(normal(3, 16))[0])


def test_repr_has_no_numbers_of_arrays() -> None:
    norm = FastRMSNorm(jnp.ones(16, jnp.bfloat16), rounding="hf")
    assert repr(norm) == "FastRMSNorm(weight=bfloat16[16], eps=1e-06, weight_offset=0.0, rounding='hf', implementation=None)"
    assert repr(FastLayerNorm(None)) == "FastLayerNorm(weight=None, bias=None, eps=1e-05, rounding=None, implementation=None)"


def test_torch_tensors_become_arrays() -> None:
    torch = pytest.importorskip("torch")
    for dtype in ("float32", "float16", "bfloat16"):
        given = torch.from_numpy(normal(16)).to(getattr(torch, dtype)).requires_grad_()
        loaded = FastLayerNorm.load("norm", {"norm.weight": given, "norm.bias": given}, 1e-5)
        for array in (loaded.weight, loaded.bias):
            assert array is not None and array.dtype == dtype
            assert np.asarray(array, np.float32).tolist() == given.float().tolist()


def test_options_are_checked_at_once_and_the_implementation_at_the_call() -> None:
    for norm in (FastRMSNorm, FastLayerNorm):
        with pytest.raises(OptionError, match="'none'"):
            norm(jnp.ones(16), rounding="none")
    with pytest.raises(OptionError, match="eps"):
        dataclasses.replace(FastRMSNorm(jnp.ones(16)), eps=-1.0)
    with pytest.raises(OptionError, match=r"eps must be a finite number, got \[1.0\]"):
        FastLayerNorm(jnp.ones(16), eps=[1.0])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean 'reference'"):
        FastLayerNorm(jnp.ones(16), implementation="referenc")(normal(2, 16))
