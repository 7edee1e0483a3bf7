# SPDX-License-Identifier: Apache-2.0
"""The norms as plain pytrees, as flax.nnx modules and as Equinox modules: with the real libraries, against their own norms."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from normkit import MissingTensorError, NormkitError, OptionError
from normkit.tolerance import expected_backward, expected_forward, worst

from .cases import MODELS, Case

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

PACKAGES = {"modules": "jax", "nnx": "flax.nnx", "equinox": "equinox"}
NAMES = ("t5_base", "gemma_2_2b", "llama_3_70b_fp32_stream", "gpt_2_fp32", "mpt_7b")
# with an eps that matters, and is nobody's default
CASES = [replace(case, eps=0.1) for case in MODELS if case.name in NAMES]
RMS, LAYER = CASES[2], CASES[3]


class Library:
    """What differs between the libraries; `package` is jax, flax.nnx or equinox."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.package = pytest.importorskip(PACKAGES[name])
        self.layers = import_module(f"normkit_jax.{name}")

    @property
    def jit(self) -> Callable[..., Any]:
        jit: Callable[..., Any] = getattr(self.package, "filter_jit" if self.name == "equinox" else "jit")
        return jit

    def load(self, case: Case, arrays: dict[str, Any], **options: Any) -> Any:
        """Load a case's norm from a mapping."""
        names = [name for name in ("weight", "bias") if arrays[name] is not None]
        weights = {f"norm.{name}": jnp.asarray(arrays[name]) for name in names}
        if case.kind == "rms":
            return self.layers.FastRMSNorm.load("norm", weights, case.eps, weight_offset=case.weight_offset, **options)
        load = self.layers.FastLayerNorm.load if "bias" in names else self.layers.FastLayerNorm.load_no_bias
        return load("norm", weights, case.eps, **options)

    def gradients(self, loss: Callable[..., Any], norm: Any, *arrays: Any) -> dict[str, Any]:
        """Return the gradients of loss(norm, x, residual)."""
        if self.name == "equinox":
            of_norm, dx, dresidual = self.package.filter_grad(lambda both: loss(*both))((norm, *arrays))
        else:
            of_norm, dx, dresidual = self.package.grad(loss, argnums=(0, 1, 2))(norm, *arrays)
        if self.name == "nnx":
            parameters = {name: of_norm[name][...] for name in of_norm}
        else:
            parameters = {name: getattr(of_norm, name, None) for name in ("weight", "bias")}
        return {f"d{name}": gradient for name, gradient in parameters.items()} | {"dx": dx, "dresidual": dresidual}


@pytest.fixture(params=PACKAGES)
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


@pytest.fixture
def nnx() -> Library:
    return Library("nnx")


@pytest.fixture
def equinox() -> Library:
    return Library("equinox")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_within_the_bounds(library: Library, case: Case) -> None:
    given: dict[str, Any] = case.arrays()
    norm = library.load(case, given)
    operands = {name: given[name] for name in ("x", "residual", "weight", "bias")}
    y, residual_out = library.jit(lambda norm, *arrays: norm(*arrays))(norm, given["x"], given["residual"])
    expected_y, expected_residual_out = expected_forward(case.problem(), **operands)
    assert (y.dtype, residual_out.dtype) == (case.x, case.residual)
    assert worst(y, expected_y) <= 1
    assert worst(residual_out, expected_residual_out) <= 1

    def loss(norm: Any, x: Any, residual: Any) -> Any:
        y, residual_out = norm(x, residual)
        return (y * given["dy"].astype("float32")).sum() + (residual_out * given["dresidual_out"].astype("float32")).sum()

    gradients = library.gradients(loss, norm, *(jnp.asarray(given[name]) for name in ("x", "residual")))
    expected = expected_backward(case.problem(), given["dy"], given["dresidual_out"], np.asarray(residual_out), given["weight"])
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(expected)
    for name, expectation in expected.items():
        assert worst(gradients[name], expectation) <= 1, name


def test_without_a_residual_the_input_is_handed_on(library: Library) -> None:
    given = RMS.arrays()
    x = jnp.asarray(given["x"])
    normed, residual = library.load(RMS, given)(x)
    assert residual is x
    plain = Library("modules").load(RMS, given)
    assert np.array_equal(normed, plain(x)[0])


def test_options_reach_the_function(library: Library) -> None:
    given = LAYER.arrays()
    with pytest.raises(NormkitError, match="nonsense"):
        library.load(LAYER, given, implementation="nonsense")(given["x"])
    with pytest.raises(NormkitError, match="rounding"):
        library.load(RMS, given, rounding="nonsense")(given["x"])


def test_loading_keeps_the_dtype_and_names_what_is_missing(library: Library) -> None:
    layers = library.layers
    weights = {"norm.weight": jnp.full(4, 2, jnp.bfloat16)}
    norm = layers.FastLayerNorm.load_no_bias("norm", weights, 1e-5)
    assert norm.bias is None
    assert norm.weight[...].dtype == jnp.bfloat16
    assert layers.FastRMSNorm.load("norm", weights).eps == 1e-6
    with pytest.raises(MissingTensorError, match=r"norm\.bias"):
        layers.FastLayerNorm.load("norm", weights, 1e-5)
    with pytest.raises(MissingTensorError, match=r"other\.weight"):
        layers.FastRMSNorm.load("other", weights)


@pytest.mark.parametrize("case", [case for case in CASES if not case.weight_offset], ids=lambda case: case.name)
def test_nnx_norms_are_the_same_function(nnx: Library, case: Case) -> None:
    given: dict[str, Any] = case.arrays()
    options = {"epsilon": case.eps, "use_fast_variance": False, "rngs": nnx.package.Rngs(0)}
    if case.kind == "layer":
        options["use_bias"] = case.bias is not None
    theirs = {"rms": nnx.package.RMSNorm, "layer": nnx.package.LayerNorm}[case.kind](case.shape[-1], **options)
    theirs.scale[...] = jnp.asarray(given["weight"], jnp.float32)
    if case.bias:
        theirs.bias[...] = jnp.asarray(given["bias"])
    h = given["x"].astype("float32") + given["residual"].astype("float32")
    _same(theirs(jnp.asarray(h)), nnx.load(case, given)(h)[0], case, h, given)


@pytest.mark.parametrize("case", [case for case in CASES if not case.weight_offset], ids=lambda case: case.name)
def test_equinox_norms_are_the_same_function(equinox: Library, case: Case) -> None:
    given: dict[str, Any] = case.arrays()
    nn = equinox.package.nn
    made = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[case.kind](case.shape[-1], case.eps, use_bias=case.bias is not None)
    theirs = equinox.package.tree_at(lambda norm: norm.weight, made, jnp.asarray(given["weight"], jnp.float32))
    if case.bias:
        theirs = equinox.package.tree_at(lambda norm: norm.bias, theirs, jnp.asarray(given["bias"]))
    h = given["x"].astype("float32") + given["residual"].astype("float32")
    rows = jax.vmap(theirs)(jnp.asarray(h).reshape(-1, case.shape[-1])).reshape(case.shape)
    ours = equinox.load(case, given)
    _same(rows, ours(h)[0], case, h, given)
    _same(jax.vmap(lambda row: ours(row)[0])(jnp.asarray(h)), ours(h)[0], case, h, given)


def _same(theirs: Any, ours: Any, case: Case, h: Any, given: dict[str, Any]) -> None:
    """Both are within the bounds of a norm of h in float32."""
    fp32 = Case(case.name, case.kind, case.shape, "float32", None, case.weight, case.bias, case.eps)
    expected, _ = expected_forward(fp32.problem(), h, None, given["weight"], given["bias"])
    assert theirs.dtype == ours.dtype == jnp.float32
    assert worst(theirs, expected) <= 1
    assert worst(ours, expected) <= 1


def test_nnx_split_merge_and_update(nnx: Library) -> None:
    given, package = LAYER.arrays(), nnx.package
    norm = nnx.load(LAYER, given)
    definition, state = package.split(norm)
    assert set(state) == {"weight", "bias"}
    assert definition == package.split(nnx.load(LAYER, given))[0]
    assert definition != package.split(nnx.load(LAYER, given, rounding="hf"))[0]
    merged = package.merge(definition, state)
    assert np.array_equal(merged(given["x"])[0], norm(given["x"])[0])

    def descend(norm: Any, x: Any) -> Any:
        loss, gradient = package.value_and_grad(lambda norm: (norm(x)[0] ** 2).mean())(norm)
        package.update(norm, jax.tree.map(lambda weight, slope: weight - 0.1 * slope, package.state(norm), gradient))
        return loss

    step = package.jit(descend)
    losses = [float(step(norm, given["x"])) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_nnx_constructor(nnx: Library) -> None:
    package, layers = nnx.package, nnx.layers
    assert np.array_equal(layers.FastRMSNorm(3, weight_offset=1.0).weight[...], np.zeros(3))
    assert layers.FastRMSNorm(3, param_dtype=jnp.bfloat16, rngs=package.Rngs(0)).weight[...].dtype == jnp.bfloat16
    assert layers.FastLayerNorm(3, use_bias=False).bias is None
    random = package.initializers.normal()
    norms = [layers.FastLayerNorm(3, weight_init=random, bias_init=random, rngs=package.Rngs(0)) for _ in range(2)]
    assert np.array_equal(norms[0].weight[...], norms[1].weight[...])
    assert not np.array_equal(norms[0].weight[...], norms[0].bias[...])
    abstract = package.eval_shape(lambda: layers.FastRMSNorm(5, rngs=package.Rngs(0)))
    assert abstract.weight.shape == (5,)


def test_equinox_fields_are_static_and_leaves_are_arrays(equinox: Library) -> None:
    given, package = LAYER.arrays(), equinox.package
    norm = equinox.load(LAYER, given)
    assert len(jax.tree.leaves(norm)) == 2
    arrays, static = package.partition(norm, package.is_array)
    assert np.array_equal(package.combine(arrays, static)(given["x"])[0], norm(given["x"])[0])
    assert jax.tree.structure(norm) != jax.tree.structure(equinox.load(LAYER, given, rounding="hf"))
    doubled = package.tree_at(lambda norm: (norm.weight, norm.bias), norm, replace_fn=lambda leaf: 2 * leaf)
    assert np.array_equal(doubled(given["x"])[0], 2 * norm(given["x"])[0])


def test_what_is_no_option_is_refused_at_once(library: Library) -> None:
    rms, layer, weights = (
        library.layers.FastRMSNorm,
        library.layers.FastLayerNorm,
        {"a.weight": jnp.ones(4), "a.bias": jnp.ones(4)},
    )
    for load, options in (
        (rms.load, {"dtype": jnp.bfloat16}),
        (layer.load, {"use_bias": False}),
        (layer.load_no_bias, {"x": 1}),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            load("a", weights, 1e-5, **options)
    size: Any = jnp.ones(4) if library.name == "modules" else 4
    for norm in (rms, layer):
        with pytest.raises(OptionError, match="rounding"):
            norm(size, rounding="hff")
        with pytest.raises(OptionError, match="eps"):
            norm(size, eps=-1.0)


def test_equinox_weights_have_a_dtype_of_their_own(equinox: Library) -> None:
    """A weak one would change with the first update, and have everything compiled again."""
    for norm in (equinox.layers.FastRMSNorm(4), equinox.layers.FastLayerNorm(4)):
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(norm))


def test_equinox_serialises(equinox: Library) -> None:
    given, package = LAYER.arrays(), equinox.package
    norm = equinox.load(LAYER, given)
    file = io.BytesIO()
    package.tree_serialise_leaves(file, norm)
    file.seek(0)
    empty = equinox.layers.FastLayerNorm(LAYER.shape[-1], LAYER.eps)
    assert bool(package.tree_equal(package.tree_deserialise_leaves(file, empty), norm))


def test_equinox_constructor(equinox: Library) -> None:
    layers = equinox.layers
    assert np.array_equal(layers.FastRMSNorm(3, weight_offset=1.0).weight, np.zeros(3))
    assert layers.FastLayerNorm(3, dtype=jnp.bfloat16).bias.dtype == jnp.bfloat16
    assert layers.FastLayerNorm(3, use_bias=False).bias is None


@pytest.mark.parametrize(("module", "package"), [("nnx", "flax"), ("equinox", "equinox")])
def test_a_missing_package_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"normkit_jax.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}") as error:
        import_module(f"normkit_jax.{module}")
    assert isinstance(error.value, NormkitError)


def test_neither_library_is_imported_unasked() -> None:
    code = "import sys, normkit_jax; sys.exit(bool({'flax', 'equinox'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
