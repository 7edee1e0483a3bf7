# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels in JAX: the bits of NumPy and torch under every transformation, and what they leave to the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

import normkit
import normkit_jax
from normkit.cpu import library
from normkit.errors import UnsupportedError
from normkit.spec import NormSpec, Operand, describe
from normkit_jax import cpu

from .cases import Case, tagged
from .frameworks import Framework, NumPy, installed

pytestmark = pytest.mark.skipif(isinstance(library.load(), library.Missing), reason="the CPU kernels are not compiled")

CASES = [case for case in tagged("ci") if "float64" not in case.problem().dtypes]
MIXED = Case("mixed", "layer", (3, 5, 96), residual="float32", bias="bfloat16")
ROOT = Path(__file__).parent.parent


def bits(array: Any) -> Any:
    """What tells apart any two arrays, NaN and signed zeros included."""
    return None if array is None else (array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes())


def assert_same_bits(found: Any, expected: Any) -> None:
    """Compare trees of arrays."""
    ours, theirs = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(ours) == len(theirs) > 0
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert bits(np.asarray(one)) == bits(np.asarray(other)), index


def everything(framework: Framework, case: Case) -> dict[str, Any]:
    """Return the bits of all results and gradients that there are."""
    arrays = {name: framework.array(array) for name, array in case.arrays().items()}
    y, residual_out = framework.call(case, arrays, "cpu")
    kept, gradients = framework.gradients(case, arrays, "cpu")
    # what a case has no operand for, not every framework names
    made = {"y": y, "residual_out": residual_out, "kept": kept, **gradients}
    return {name: bits(framework.numpy(array)) for name, array in made.items() if array is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_jax_and_numpy_give_the_same_bits(case: Case) -> None:
    expected = everything(NumPy(), case)
    for name, framework in installed().items():
        found = everything(framework, case)
        for what, value in found.items():
            assert value == expected[what], (name, what)
        assert {"y", *(operand for operand in ("x", "residual", "weight", "bias") if getattr(case, operand))} <= found.keys()


def given(case: Case = MIXED) -> list[Any]:
    """Return x, residual, weight, bias, dy and dresidual_out."""
    return [jnp.asarray(array) for array in case.arrays().values()]


def both_ways(*arrays: Any, implementation: str | None = "cpu") -> Any:
    """Return the results and the gradients of all operands."""

    def function(*operands: Any) -> Any:
        return normkit_jax.add_layer_norm(*operands, implementation=implementation)

    results, vjp = jax.vjp(function, *arrays[:4])
    return results, vjp(tuple(arrays[4:]))


def test_it_is_the_automatic_choice_and_one_custom_call(selected: list[str]) -> None:
    x, residual, weight, bias, *_ = given()
    selected.clear()
    lowered = jax.jit(normkit_jax.add_layer_norm).lower(x, residual, weight, bias).as_text()
    assert set(selected) == {"cpu"}
    assert lowered.count("custom_call") == 1
    assert "@normkit_cpu_forward" in lowered
    assert "stablehlo.add" not in lowered
    assert_same_bits(both_ways(*given(), implementation=None), both_ways(*given()))


def test_transformations_have_the_bits_of_the_plain_call() -> None:
    arrays = given()
    expected = both_ways(*arrays)
    assert_same_bits(jax.jit(both_ways)(*arrays), expected)
    with jax.disable_jit():
        assert_same_bits(both_ways(*arrays), expected)
    assert_same_bits(jax.checkpoint(both_ways)(*arrays), expected)


def test_a_gradient_through_checkpoint_has_the_same_bits() -> None:
    x, residual, weight, bias, dy, _ = given()

    def loss(weight: Any, function: Any) -> Any:
        return (function(x, residual, weight, bias)[0] * dy).sum()

    again = jax.checkpoint(normkit_jax.add_layer_norm)
    expected = jax.jit(jax.grad(lambda weight: loss(weight, normkit_jax.add_layer_norm)))(weight)
    assert_same_bits(jax.jit(jax.grad(lambda weight: loss(weight, again)))(weight), expected)


def test_mapped_and_scanned_rows_have_the_bits_of_the_whole() -> None:
    x, residual, weight, bias, *_ = given()
    expected = normkit_jax.add_layer_norm(x, residual, weight, bias)
    assert_same_bits(jax.vmap(lambda x, r: normkit_jax.add_layer_norm(x, r, weight, bias))(x, residual), expected)

    def step(carry: Any, rows: Any) -> Any:
        return carry, normkit_jax.add_layer_norm(rows[0], rows[1], weight, bias)

    assert_same_bits(jax.lax.scan(step, 0, (x, residual))[1], expected)


@pytest.mark.parametrize("donate", [True, False])
def test_in_place_takes_the_memory_that_is_given_up_and_no_other(donate: bool) -> None:
    x, residual, weight, *_ = given(Case("in_place", "layer", (64, 512), bias="bfloat16"))
    expected = normkit.add_rms_norm(*map(np.asarray, (x, residual, weight)), implementation="cpu")
    before = bits(np.asarray(x))
    # memory that NumPy sees too cannot be given up
    x, residual = x.copy(), residual.copy()
    pointers = [array.unsafe_buffer_pointer() for array in (x, residual)]
    function = jax.jit(normkit_jax.add_rms_norm_, donate_argnums=(0, 1) if donate else ())
    found = function(x, residual, weight)
    assert_same_bits(found, expected)
    assert ([array.unsafe_buffer_pointer() for array in found] == pointers) == donate
    assert donate or bits(np.asarray(x)) == before


def test_eight_threads_at_once() -> None:
    arrays = given(Case("threads", "layer", (64, 512), bias="bfloat16"))
    expected = both_ways(*arrays)
    compiled: Any = jax.jit(both_ways)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda index: (compiled if index % 2 else both_ways)(*arrays), range(64)):
            assert_same_bits(found, expected)


def test_subnormals_are_kept_on_every_thread_of_xla_and_ours() -> None:
    x = np.full((64, 4096), 1e-40, np.float32)
    expected = normkit.add_rms_norm(x, x, None, eps=0.0, implementation="cpu")
    assert expected[1].any()
    function = jax.jit(lambda x: normkit_jax.add_rms_norm(x, x, None, eps=0.0, implementation="cpu"))
    for _ in range(10):
        assert_same_bits(function(jnp.asarray(x)), expected)


def test_float64_and_open_sizes_are_for_the_reference(selected: list[str]) -> None:
    with jax.enable_x64(True):
        x = jnp.ones((2, 8), jnp.float64)
        normkit_jax.rms_norm(x)
        with pytest.raises(UnsupportedError, match="not enough for float64"):
            normkit_jax.rms_norm(x, implementation="cpu")
    assert selected[0] == "reference"
    rejected = cpu.supports(describe(NormSpec("rms"), Operand(("rows", 8), "float32")))  # type: ignore[arg-type]
    assert rejected
    assert "sizes known while compiling" in rejected.reason


def test_an_exported_program_has_the_reference() -> None:
    shape = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    for platforms in (("cpu",), ("cpu", "tpu")):
        exported = jax.export.export(jax.jit(normkit_jax.rms_norm), platforms=platforms)(shape)
        assert "custom_call" not in exported.mlir_module()
    with pytest.raises(UnsupportedError, match="of this process"):
        jax.export.export(jax.jit(lambda x: normkit_jax.rms_norm(x, implementation="cpu")), platforms=("cpu",))(shape)


def test_without_kernels_the_reference_computes(monkeypatch: pytest.MonkeyPatch, selected: list[str]) -> None:
    monkeypatch.setattr(library, "load", lambda: library.Missing("its kernels are not compiled"))
    normkit_jax.rms_norm(jnp.ones((2, 7)))
    assert selected[-1] == "reference"
    with pytest.raises(UnsupportedError, match="not compiled"):
        normkit_jax.rms_norm(jnp.ones((2, 7)), implementation="cpu")


def test_a_jaxlib_that_does_not_take_the_custom_calls_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise jax.errors.JaxRuntimeError("the handler's API version is incompatible")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    rejected = cpu._register.__wrapped__()
    assert rejected
    assert rejected.reason.endswith("does not take its custom calls: the handler's API version is incompatible")


def custom_call(x: Any, level: int = library.FASTEST) -> tuple[Any, Any]:
    """Return the custom call of an RMSNorm of x alone, and its attribute."""
    problem = describe(NormSpec("rms"), Operand(x.shape, "float32"))
    assert cpu.supports(problem) is None
    packed = library.packed_forward(problem, (1, 0, 0, 0, 1, 0, 0, 0), (x.shape[-1], 0) * 4, 1, 1, level=level)
    call = jax.ffi.ffi_call(cpu._FORWARD, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    return call, np.frombuffer(packed, np.int64)


def test_a_custom_call_with_other_arrays_or_of_another_version_touches_no_memory() -> None:
    x = jnp.ones((4, 64))
    call, packed = custom_call(x)
    assert_same_bits(call(x, call=packed), normkit_jax.rms_norm(x, implementation="cpu"))
    for arrays in ((), (x, x), (x[1:],)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="other arrays than those it was made for"):
            jax.block_until_ready(call(*arrays, call=packed))
    for attributes in ({"call": packed[1:]}, {"call": packed.astype(np.int32)}, {"call": 1}, {}, {"call": packed, "more": 1}):
        with pytest.raises(jax.errors.JaxRuntimeError, match="another version of normkit"):
            jax.block_until_ready(call(x, **attributes))


def test_a_level_that_the_processor_lacks_is_an_error_of_the_program() -> None:
    x = jnp.ones((4, 64))
    call, packed = custom_call(x, level=7)
    with pytest.raises(jax.errors.JaxRuntimeError, match="lacks the instructions"):
        jax.block_until_ready(call(x, call=packed))


def test_a_program_is_found_again_in_the_persistent_cache(tmp_path: Path) -> None:
    code = (
        "import sys, jax, jax.numpy as jnp, normkit_jax\n"
        "jax.config.update('jax_compilation_cache_dir', sys.argv[1])\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)\n"
        "print(float(jax.jit(lambda x: normkit_jax.rms_norm(x, implementation='cpu'))(jnp.arange(64.0))[3]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    printed, kept = [], []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(tmp_path)]
        options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "check": True, "timeout": 120}
        printed.append(subprocess.run(command, **options).stdout)
        kept.append({path.name for path in tmp_path.glob("*-cache")})
    assert printed[0] == printed[1]
    assert kept[0] == kept[1]
    assert any("lambda" in name for name in kept[0])
