# SPDX-License-Identifier: Apache-2.0
"""The row mathematics inside Pallas kernels: before and after a matmul, interpreted, and lowered for TPU and GPU.

The matmuls are exact, so that what is judged is the norm: integers that float32 holds, or a permutation with signs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normkit import DtypeError, OptionError, ShapeError
from normkit.arrays import numpy_dtype
from normkit.spec import NormSpec
from normkit.tolerance import expected_forward, worst

from .cases import Case, NumpyArray

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402

from normkit_jax.pallas import _rounded, add_norm_rows, norm_rows  # noqa: E402

ROWS, BLOCK_ROWS, COLUMNS, INNER = 32, 16, 256, 64
GRID = (ROWS // BLOCK_ROWS,)
_F32: dict[str, Any] = {"x": "float32", "residual": "float32", "weight": "float32"}
_F16: dict[str, Any] = {"x": "float16", "residual": "float16", "weight": "float16"}
CASES = (
    Case("rms_fp32", "rms", (ROWS, COLUMNS), **_F32),
    Case("layer_fp32", "layer", (ROWS, COLUMNS), **_F32, bias="float32", mean=100.0),
    Case("rms_bf16", "rms", (ROWS, COLUMNS)),
    Case("gemma_bf16", "rms", (ROWS, COLUMNS), weight="float32", weight_offset=1.0, eps=1e-6),
    Case("stored_bf16", "layer", (ROWS, COLUMNS), bias="bfloat16", rounding="stored"),
    Case("hf_bf16", "rms", (ROWS, COLUMNS), rounding="hf"),
    Case("layer_fp16", "layer", (ROWS, COLUMNS), **_F16, bias="float16"),
    Case("stored_fp16", "rms", (ROWS, COLUMNS), **_F16, rounding="stored"),
    Case("residual_wider", "rms", (ROWS, COLUMNS), residual="float32"),
    Case("no_weight", "layer", (ROWS, COLUMNS), weight=None),
    Case("padded_rms", "rms", (ROWS, 200)),
    Case("padded_layer", "layer", (ROWS, 200), **_F32, bias="float32", mean=100.0),
    Case("padded_hf", "layer", (ROWS, 130), weight="float32", bias="float32", rounding="hf"),
)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _factors() -> tuple[NumpyArray, NumpyArray]:
    rng = np.random.default_rng(0)
    left, right = rng.integers(-1, 2, (ROWS, INNER)), rng.integers(-1, 2, (INNER, COLUMNS))
    return left.astype(ml_dtypes.bfloat16), right.astype(ml_dtypes.bfloat16)


def _permutation() -> NumpyArray:
    rng = np.random.default_rng(1)
    return np.eye(COLUMNS)[rng.permutation(COLUMNS)] * rng.choice([-2.0, 0.5, 1.0], COLUMNS)


FACTORS, PERMUTATION = _factors(), _permutation()


def _rows(columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((BLOCK_ROWS, columns), lambda i: (i, 0))


def _whole(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda i: (0, 0))


def _parameters(given: dict[str, Any]) -> dict[str, NumpyArray]:
    """Weight and bias, those there are, as rows as long as the block."""
    names = [name for name in ("weight", "bias") if given[name] is not None]
    return {name: np.pad(given[name], (0, COLUMNS - given[name].size))[None] for name in names}


def prologue(case: Case, hidden_size: int | None, **options: Any) -> tuple[Any, list[Any]]:
    """Norm, then a matmul with PERMUTATION: the call and its arguments."""

    def kernel(x: Any, parameters: dict[str, Any], matrix: Any, out: Any) -> None:
        values = {name: ref[...] for name, ref in parameters.items()}
        y = norm_rows(x[...], **values, spec=case.spec, hidden_size=hidden_size)
        # so that float32 stays that on a GPU
        precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
        out[...] = jnp.dot(y, matrix[...], preferred_element_type=jnp.float32, precision=precision)

    given = case.arrays()
    parameters, matrix = _parameters(given), PERMUTATION.astype(numpy_dtype(case.x))
    specs = [_rows(COLUMNS), jax.tree.map(_whole, parameters), _whole(matrix)]
    shape = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    call = pl.pallas_call(kernel, grid=GRID, in_specs=specs, out_specs=_rows(COLUMNS), out_shape=shape, **options)
    return call, [given["x"], parameters, matrix]


def epilogue(case: Case, hidden_size: int | None, **options: Any) -> tuple[Any, list[Any]]:
    """A matmul of FACTORS, then add and norm: the call and its arguments."""

    def kernel(left: Any, right: Any, residual: Any, parameters: dict[str, Any], y: Any, residual_out: Any) -> None:
        product = jnp.dot(left[...], right[...], preferred_element_type=jnp.float32).astype(_product_dtype(case))
        values = {name: ref[...] for name, ref in parameters.items()}
        results = add_norm_rows(product, residual[...], **values, spec=case.spec, out_dtype=case.x, hidden_size=hidden_size)
        y[...], residual_out[...] = results

    given, (left, right) = case.arrays(), FACTORS
    parameters = _parameters(given)
    specs = [_rows(INNER), _whole(right), _rows(COLUMNS), jax.tree.map(_whole, parameters)]
    shapes = [jax.ShapeDtypeStruct(case.shape, dtype) for dtype in (case.x, case.residual)]
    call = pl.pallas_call(kernel, grid=GRID, in_specs=specs, out_specs=[_rows(COLUMNS)] * 2, out_shape=shapes, **options)
    return call, [left, right, given["residual"], parameters]


def _product_dtype(case: Case) -> str:
    """With "hf" the dtype of x is part of the result."""
    return case.x if case.rounding == "hf" else "float32"


def prologue_error(case: Case, out: Any) -> float:
    """Return the largest error of y, in units of its bound; what is beyond the row must be 0."""
    y = np.asarray(out, np.float64) @ np.linalg.inv(PERMUTATION)
    alone = replace(case, residual=None)
    given = case.arrays()
    expected, _ = expected_forward(alone.problem(), given["x"], None, given["weight"], given["bias"])
    hidden = case.shape[1]
    return max(worst(y[:, :hidden], expected), float(np.abs(y[:, hidden:]).max(initial=0)))


def epilogue_error(case: Case, y: Any, residual_out: Any) -> float:
    """Return the largest error of y and residual_out, in units of their bounds."""
    left, right = (factor.astype(np.float64) for factor in FACTORS)
    given, x = case.arrays(), (left @ right)[:, : case.shape[1]]
    problem = replace(case, x=_product_dtype(case), out_dtype=case.x).problem()
    operands = [given[name] for name in ("residual", "weight", "bias")]
    expected = expected_forward(problem, x, *operands, residual_out=np.asarray(residual_out))
    return max(worst(np.asarray(y), expected[0]), worst(np.asarray(residual_out), expected[1]))


def lowers(case: Case, which: Any) -> bool:
    """Whether Pallas has the operations: all but the rounding to float16 in the middle of a kernel."""
    rounds = case.rounding == "hf" or (case.rounding == "stored" and which is epilogue)
    return not (rounds and case.x == "float16")


@pytest.fixture(params=[prologue, epilogue], ids=lambda which: which.__name__)
def which(request: pytest.FixtureRequest) -> Any:
    return request.param


def error_of(which: Any, case: Case, hidden_size: int | None, **options: Any) -> float:
    call, arguments = which(case, hidden_size, **options)
    results = jax.jit(call)(*arguments)
    return prologue_error(case, results) if which is prologue else epilogue_error(case, *results)


@EVERY_CASE
def test_interpreted(which: Any, case: Case) -> None:
    assert error_of(which, case, case.shape[1], interpret=True) <= 1


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("padded")], ids=lambda case: case.name)
def test_padding_matters(which: Any, case: Case) -> None:
    """Without hidden_size the result is wrong, so the test above can fail."""
    assert not error_of(which, case, None, interpret=True) <= 1


@EVERY_CASE
def test_lowers_for_tpu(which: Any, case: Case) -> None:
    call, arguments = which(case, case.shape[1])
    refused = (
        contextlib.nullcontext() if lowers(case, which) else pytest.raises(NotImplementedError, match="optimization_barrier")
    )
    with refused:
        exported = jax.export.export(jax.jit(call), platforms=["tpu"])(*arguments)
        assert "tpu_custom_call" in exported.mlir_module()


@pytest.fixture
def through_triton() -> Iterator[dict[str, Any]]:
    """What pallas_call needs to go through Triton; without a GPU, one must be imagined from jax 0.11 on."""
    from jax.experimental.pallas import triton

    imagined: Any = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu":
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
        imagined = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    with imagined:
        yield {"compiler_params": triton.CompilerParams()}


# Pallas' way through Triton is deprecated from jax 0.11 on, and its other way to GPUs has no reductions over rows.
DEPRECATED = pytest.mark.filterwarnings("ignore:.*[Tt]riton:DeprecationWarning")


@DEPRECATED
@EVERY_CASE
def test_lowers_for_gpu(which: Any, case: Case, through_triton: dict[str, Any]) -> None:
    call, arguments = which(case, case.shape[1], **through_triton)
    missing = "optimization_barrier|reduce_precision"
    refused = contextlib.nullcontext() if lowers(case, which) else pytest.raises(NotImplementedError, match=missing)
    unstable = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with refused:
        exported = jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=unstable)(*arguments)
        assert "__gpu$xla.gpu.triton" in exported.mlir_module()


@DEPRECATED
@EVERY_CASE
def test_on_gpu(which: Any, case: Case, through_triton: dict[str, Any]) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    if not lowers(case, which):
        pytest.skip("Pallas does not round to float16 inside a kernel")
    assert error_of(which, case, case.shape[1], **through_triton) <= 1


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    """Every bfloat16 and what lies around it and around the middle to the next one, infinities and NaN among them."""
    near = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | near).view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(jax.jit(_rounded, static_argnums=1)(values, "bfloat16"), expected, equal_nan=True)


@pytest.mark.parametrize("rounding", ["sum", "stored", "hf"])
def test_what_is_rounded(rounding: str) -> None:
    """The bounds allow for a rounding left out; here the results show it."""
    x = jnp.linspace(-2, 3, COLUMNS, dtype=jnp.bfloat16)[None]
    residual, spec = x.astype(jnp.float32) / 3, NormSpec("rms", rounding=rounding)
    options: dict[str, Any] = {"spec": spec, "out_dtype": jnp.float32}
    function = jax.jit(lambda: add_norm_rows(x, residual, residual_dtype=jnp.bfloat16, **options))
    y, residual_out = function()
    stored = jax.jit(lambda: norm_rows(residual_out.astype(jnp.float32), **options | {"spec": NormSpec("rms")}))()
    assert bool((y == y.astype(jnp.bfloat16)).all()) == (rounding == "hf")
    assert np.array_equal(y, stored) == (rounding == "stored")


def test_errors() -> None:
    x, spec = jnp.ones((2, 8)), NormSpec("rms")
    with pytest.raises(ShapeError, match="from 1 to 8"):
        norm_rows(x, spec=spec, hidden_size=9)
    with pytest.raises(ShapeError, match="from 1 to 8"):
        add_norm_rows(x, x, spec=spec, hidden_size=0)
    with pytest.raises(ShapeError, match="weight"):
        norm_rows(x, jnp.ones((2, 8)), spec=spec)
    with pytest.raises(ShapeError, match="residual"):
        add_norm_rows(x, x[:1], spec=spec)
    with pytest.raises(DtypeError, match="int32"):
        norm_rows(jnp.ones((2, 8), jnp.int32), spec=spec)
    with pytest.raises(OptionError, match="weight_offset"):
        norm_rows(x, spec=NormSpec("rms", weight_offset=1.0))
