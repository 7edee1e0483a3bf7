# SPDX-License-Identifier: Apache-2.0
"""What JAX programs become on GPUs: lowered and exported without one, the launches in them read back and held to the plan."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

import jax

import normkit_jax
from normkit import plan
from normkit.compile import CompiledKernel, compile_backward, compile_forward
from normkit.errors import UnsupportedError
from normkit.interface import Wanted
from normkit.spec import NormSpec, Operand, Problem, describe
from normkit.tolerance import expected_forward, worst
from normkit_jax import launch

from .cases import Case
from .frameworks import Jax
from .jax_gpu.decoder import Message, messages

ARCHITECTURES = {"cuda": "sm_90", "rocm": "gfx942"}
LAUNCHES_ON_ROCM = jax.__version_info__ >= (0, 11, 1)
CUSTOM_CALL = jax.export.DisabledSafetyCheck.custom_call(launch.TARGET)
_OPTIONS: dict[str, Any] = {"x": "float32", "residual": "bfloat16", "weight_offset": 0.5, "rounding": "stored"}
CASES = (
    Case("rms", "rms", (6, 512)),
    Case("rms_alone", "rms", (2, 3, 512), residual=None),
    Case("layer", "layer", (6, 512), bias="bfloat16"),
    Case("layer_options", "layer", (6, 512), **_OPTIONS, bias="float32"),
    Case("many_rows", "rms", (2048, 1024), x="float32", residual="float32"),
    Case("long_rms", "rms", (3, 40000)),
    Case("long_layer", "layer", (3, 40000), bias="float16"),
)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EVERY_PLATFORM = pytest.mark.parametrize(
    "platform",
    [
        "cuda",
        pytest.param("rocm", marks=pytest.mark.skipif(not LAUNCHES_ON_ROCM, reason="the kernels need jax 0.11.1 on rocm")),
    ],
)


def shapes(case: Case) -> list[Any]:
    """Return x, residual, weight and bias, of those that there are, as shapes only."""
    problem = case.problem()
    given = {"x": problem.shape, "residual": problem.shape, "weight": problem.shape[-1:], "bias": problem.shape[-1:]}
    return [jax.ShapeDtypeStruct(shape, getattr(case, name)) for name, shape in given.items() if getattr(case, name)]


def forward_of(case: Case, implementation: str | None = None) -> Callable[..., Any]:
    names = [name for name in ("x", "residual", "weight", "bias") if getattr(case, name)]

    def function(*given: Any) -> Any:
        arrays = dict.fromkeys(("residual", "weight", "bias")) | dict(zip(names, given, strict=True))
        return Jax().call(case, arrays, implementation)

    return function


def backward_of(case: Case, implementation: str | None = None) -> Callable[..., Any]:
    """Return the function that makes all results and all gradients; it keeps the results, so nothing is dropped as unused."""

    def function(*given: Any) -> Any:
        results, vjp = jax.vjp(forward_of(case, implementation), *given)
        return results, vjp(jax.tree.map(jax.numpy.ones_like, results))

    return function


def lowered(function: Callable[..., Any], arguments: list[Any], platform: str, architecture: str | None = None) -> str:
    with normkit_jax.target(architecture or ARCHITECTURES[platform]):
        return str(jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text())


def exported(function: Callable[..., Any], arguments: list[Any], platforms: tuple[str, ...], *targets: str) -> Any:
    with normkit_jax.target(*targets):
        return jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=[CUSTOM_CALL])(*arguments)


def number_for(problem: Problem, wanted: Wanted | None, name: str) -> float:
    """Return the number that a launch passes as the kernel's argument of that name."""
    planned = plan.backward_plan(problem, wanted) if wanted else None
    # an XLA array is contiguous, and how its rows are strided is not looked at
    values = {"inner_rows": 0, "rows": problem.rows, "eps": problem.spec.eps, "weight_offset": problem.spec.weight_offset}
    if planned:
        values |= {"rows_per_program": planned.rows_per_program, "programs": planned.parts}
    return float(np.float32(values[name]))


def check(message: Message, line: str, step: plan.Step, code: CompiledKernel, problem: Problem, wanted: Wanted | None) -> None:
    """Check that a launch is the planned one, with the code compiled for it."""
    assert message.name == f"normkit_{step.kernel}"
    assert message.grid == (*step.grid, 1, 1)[:3]
    assert message.kernel.name == message.kernel.image_name == code.name
    assert message.kernel.num_warps == code.num_warps
    assert message.kernel.shared == message.kernel.image_shared == code.shared
    assert message.kernel.binary == code.binary
    is_cuda = code.arch.startswith("sm_")
    assert message.kernel.ptx == (code.assembly if is_cuda else "")
    assert message.kernel.compute_capability == (int(code.arch[3:]) if is_cuda else 0)
    assert message.parameters == [
        ("array", 16) if kind.startswith("*") else (kind, number_for(problem, wanted, name))
        for name, kind in code.arguments.items()
    ]
    buffers = [name.removesuffix("_ptr") for name, kind in code.arguments.items() if kind.startswith("*")]
    assert buffers_of(line) == [shape_of(name, step, code, problem, wanted) for name in buffers]


def buffers_of(line: str) -> list[str]:
    """Return the types of a call's operands, then of its results, as they stand in the lowered module."""
    types = line[line.rindex(" : (") :]
    return re.findall(r"tensor<([^>]*)>", types)


def shape_of(name: str, step: plan.Step, code: CompiledKernel, problem: Problem, wanted: Wanted | None) -> str:
    """Return the type of a kernel's buffer as MLIR writes it."""
    dtype = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[code.arguments[f"{name}_ptr"][1:]]
    shape: tuple[int, ...] = problem.shape
    if name in ("mean", "rstd"):
        shape = problem.shape[:-1]
    elif name in ("weight", "bias", "total"):
        shape = problem.shape[-1:]
    elif name in ("x_hat_g", "g"):
        assert wanted
        shape = (problem.rows, plan.backward_plan(problem, wanted).blocks)
    elif name in ("dweight", "dbias", "partial"):
        assert wanted
        shape = (plan.backward_plan(problem, wanted).parts, problem.hidden_size)
    return "x".join(map(str, (*shape, dtype)))


@EVERY_PLATFORM
@EVERY_CASE
def test_the_forward_launch_is_the_planned_one(case: Case, platform: str) -> None:
    problem = case.problem(platform=platform)
    ((message, line),) = messages(lowered(forward_of(case), shapes(case), platform))
    code = compile_forward(problem, ARCHITECTURES[platform])
    check(message, line, plan.forward_plan(problem), code, problem, None)


@EVERY_PLATFORM
@EVERY_CASE
def test_the_backward_launches_are_the_planned_ones(case: Case, platform: str) -> None:
    problem = case.problem(platform=platform, needs_grad=True)
    wanted = Wanted.by(problem)
    planned = plan.backward_plan(problem, wanted)
    steps = [plan.forward_plan(problem), *planned.steps]
    steps += [planned.total] * (wanted.dweight + wanted.dbias)
    architecture = ARCHITECTURES[platform]
    code = [compile_forward(problem, architecture), *compile_backward(problem, wanted, architecture)]
    found = messages(lowered(backward_of(case), shapes(case), platform))
    assert len(found) == len(steps) == len(code)
    for (message, line), step, compiled in zip(found, steps, code, strict=True):
        check(message, line, step, compiled, problem, wanted)


def test_buffers_are_operands_in_order_then_results() -> None:
    """The pointers of the kernel in order are the operands and then the results, which XLA passes in that order."""
    case = Case("layer", "layer", (6, 512), x="float32", residual="bfloat16", weight="float16", bias="float32")
    text = lowered(forward_of(case), shapes(case), "cuda")
    ((_, line),) = messages(text)
    assert "custom_call @triton_kernel_call_ffi(%arg0, %arg1, %arg2, %arg3)" in line
    assert buffers_of(line) == ["6x512xf32", "6x512xbf16", "512xf16", "512xf32", "6x512xf32", "6x512xbf16"]
    assert re.search(r"return %(\w+)#0, %\1#1 ", text)


def test_in_place_results_take_the_memory_of_x_and_residual() -> None:
    case = CASES[0]
    text = lowered(lambda x, residual, weight: normkit_jax.add_rms_norm_(x, residual, weight), shapes(case), "cuda")
    ((_, line),) = messages(text)
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", line)
    assert aliases == [("0", "0"), ("1", "1")]
    assert "output_operand_alias" not in lowered(forward_of(case), shapes(case), "cuda")


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_no_rows_lower_to_no_call(shape: tuple[int, ...]) -> None:
    case = Case("no_rows", "layer", shape, bias="float32")
    text = lowered(backward_of(case), shapes(case), "cuda")
    assert "custom_call" not in text


@EVERY_PLATFORM
def test_float64_lowers_to_the_reference(platform: str) -> None:
    with jax.enable_x64(True):
        case = Case("fp64", "rms", (3, 100), x="float64", residual="float64", weight="float64")
        assert "custom_call" not in lowered(backward_of(case), shapes(case), platform)


EXPORTS = [
    pytest.param(("cuda",), ("sm_90",), id="cuda"),
    pytest.param(("rocm",), ("gfx942",), id="rocm"),
    pytest.param(("cpu", "cuda", "rocm", "tpu"), ("sm_90", "gfx942"), id="cpu-cuda-rocm-tpu"),
]


@pytest.mark.parametrize("direction", [forward_of, backward_of], ids=["forward", "backward"])
@pytest.mark.parametrize(("platforms", "targets"), EXPORTS)
def test_export_for_platforms(platforms: tuple[str, ...], targets: tuple[str, ...], direction: Callable[..., Any]) -> None:
    """Each GPU platform has its launches, with its code; on rocm, an older JAX has the reference."""
    case = CASES[0]
    artefact = exported(direction(case), shapes(case), platforms, *targets)
    assert artefact.platforms == platforms
    launched = [platform for platform in platforms if platform == "cuda" or (platform == "rocm" and LAUNCHES_ON_ROCM)]
    problem = case.problem(needs_grad=direction is backward_of)
    launches = 1 if direction is forward_of else 2 + problem.spec.subtract_mean + (case.weight is not None)
    found = [message for message, _ in messages(artefact.mlir_module())]
    assert len(found) == launches * len(launched)
    for platform in launched:
        capability = 90 if platform == "cuda" else 0
        assert [message.kernel.compute_capability for message in found].count(capability) == launches
    for message in found:
        machine = int.from_bytes(message.kernel.binary[18:20], "little")
        assert machine == (190 if message.kernel.compute_capability else 224), "the ELF machine is not CUDA's, or AMD's"


def test_an_exported_program_runs_where_there_is_no_gpu() -> None:
    """One artefact for all platforms, serialised and read back, computes on the CPU what the reference computes there."""
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialise")
    case = Case("export", "rms", (6, 512), x="float32", residual="float32", weight="float32")
    arrays = [jax.numpy.asarray(array) for name, array in case.arrays().items() if name in ("x", "residual", "weight")]
    artefact = exported(backward_of(case), shapes(case), ("cpu", "cuda", "rocm", "tpu"), "sm_90", "gfx942")
    again = jax.export.deserialize(artefact.serialize())
    actual = jax.tree.leaves(again.call(*arrays))
    expected = jax.tree.leaves(jax.jit(backward_of(case, "reference"))(*arrays))
    assert len(actual) == len(expected) == 5
    for one, other in zip(actual, expected, strict=True):
        assert np.array_equal(one, other)


def test_a_number_of_rows_that_stays_open_is_for_the_reference() -> None:
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 64), "float32")
    artefact = exported(normkit_jax.rms_norm, [x], ("cpu", "cuda"), "sm_90")
    assert launch.TARGET not in artefact.mlir_module()
    given = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    y, _ = expected_forward(describe(NormSpec("rms", 1e-6), Operand(given.shape, "float32")), given)
    assert worst(np.asarray(artefact.call(given)), y) <= 1
    with pytest.raises(UnsupportedError, match=r"sizes known while compiling, and the shape is \(rows, 64\)"):
        exported(lambda x: normkit_jax.rms_norm(x, implementation="triton"), [x], ("cuda",), "sm_90")


def test_export_needs_the_safety_check_that_the_documentation_names() -> None:
    case = CASES[0]
    with normkit_jax.target("sm_90"), pytest.raises(ValueError, match=f"(?s)custom call.*{launch.TARGET}"):
        jax.export.export(jax.jit(forward_of(case)), platforms=("cuda",))(*shapes(case))
    assert f'jax.export.DisabledSafetyCheck.custom_call("{launch.TARGET}")' in (normkit_jax.target.__doc__ or "")


def test_a_program_without_kernels_exports_without_a_word() -> None:
    case = CASES[0]
    artefact = jax.export.export(jax.jit(forward_of(case, "reference")), platforms=("cuda", "rocm", "tpu"))(*shapes(case))
    assert "custom_call" not in artefact.mlir_module()


def test_triton_is_imported_only_to_compile_for_a_gpu() -> None:
    code = """
        import sys, jax, normkit_jax
        from jax import numpy as jnp
        norm = jax.jit(jax.value_and_grad(lambda x: normkit_jax.rms_norm(x).sum()))
        x = jnp.ones((2, 64))
        norm(x), jax.vmap(norm)(x[None]), normkit_jax.explain("rms_norm", x)
        jax.export.export(norm, platforms=("cpu", "tpu"))(x)
        assert "triton" not in sys.modules
        with normkit_jax.target("sm_90"):
            norm.trace(x).lower(lowering_platforms=("cuda",))
        assert "triton" in sys.modules
        """
    command = [sys.executable, "-c", "\n".join(line.removeprefix(" " * 8) for line in code.splitlines())]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_more_rows_than_32_bits_count_are_refused() -> None:
    pytest.importorskip("triton")
    x = jax.ShapeDtypeStruct((2**31, 1), np.float32)
    with normkit_jax.target("sm_90"), pytest.raises(UnsupportedError, match="32 bits, and there are 2147483648"):
        jax.jit(partial(normkit_jax.rms_norm, implementation="triton")).trace(x).lower(lowering_platforms=("cuda",))
