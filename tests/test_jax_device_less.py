# SPDX-License-Identifier: Apache-2.0
"""XLA compiles the programs for H200 GPUs that are not there: it takes our launches, and refuses what is wrong with them.

This needs the CUDA plugin and compiler of JAX, two wheels that need no GPU; tests/jax_gpu/make_env.sh installs them.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from normkit.compile import compile_backward, compile_forward
from normkit.errors import OptionError
from normkit.interface import Wanted
from normkit_jax import add_rms_norm_, launch, message, target

from .cases import CASES as EVERY
from .cases import Case
from .frameworks import Jax
from .jax_gpu import h200

# What jaxlib 0.10 does with a launch while compiling is only to look for its custom call.
READS_LAUNCHES = jax.__version_info__ >= (0, 11, 1)
CASES = (
    Case("rms", "rms", (64, 4096)),
    Case("layer", "layer", (64, 1024), x="float32", residual="bfloat16", weight="float32", bias="float32"),
    Case("long", "layer", (16, 40000), residual=None, bias="bfloat16"),
)
EVERY_AXIS_TYPE = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


def shapes(case: Case, mesh: Any) -> list[Any]:
    """Return x, residual, weight and bias as shapes only, with the rows sharded over the mesh."""
    problem = case.problem()
    found = []
    for name, shape in (("x", problem.shape), ("residual", problem.shape), ("weight", (-1,)), ("bias", (-1,))):
        if dtype := getattr(case, name):
            rows = len(shape) > 1
            sharding = NamedSharding(mesh, P("d", *(None,) * (len(shape) - 1)) if rows else P(None))
            found.append(jax.ShapeDtypeStruct(shape if rows else problem.shape[-1:], dtype, sharding=sharding))
    return found


def forward(case: Case, *given: Any) -> Any:
    names = [name for name in ("x", "residual", "weight", "bias") if getattr(case, name)]
    arrays = dict.fromkeys(("residual", "weight", "bias")) | dict(zip(names, given, strict=True))
    return Jax().call(case, arrays, "triton")


def backward(case: Case, *given: Any) -> Any:
    results, vjp = jax.vjp(partial(forward, case), *given)
    return results, vjp(jax.tree.map(jax.numpy.ones_like, results))


def compiled(function: Callable[..., Any], case: Case, mesh: Any, **options: Any) -> str:
    return str(jax.jit(function, **options).lower(*shapes(case, mesh)).compile().as_text())


def launches(text: str) -> int:
    return text.count(f'custom_call_target="{launch.TARGET}"')


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward_compile(case: Case) -> None:
    """The architecture is that of the devices compiled for, without a word."""
    mesh = h200.mesh(1, AxisType.Auto)
    assert launches(compiled(partial(forward, case), case, mesh)) == 1
    problem = case.problem(platform="cuda", needs_grad=True)
    kernels = 1 + len(compile_backward(problem, Wanted.by(problem), "sm_90"))
    assert launches(compiled(partial(backward, case), case, mesh)) == kernels


@EVERY_AXIS_TYPE
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sharded_rows_are_not_gathered(case: Case, axis_type: AxisType) -> None:
    mesh = h200.mesh(4, axis_type)
    with jax.set_mesh(mesh):
        text = compiled(partial(forward, case), case, mesh)
        assert launches(text) == 1
        assert not re.search(r" all-|collective|reduce-scatter", text)
        rows = f"{case.shape[0] // 4},{case.shape[1]}"
        assert re.search(rf"\[{rows}\][^\n]* custom-call\([^\n]*{launch.TARGET}", text), (
            "a device has not a quarter of the rows"
        )
        text = compiled(partial(backward, case), case, mesh)
        assert set(re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text)) == {"all-reduce"}


@pytest.mark.parametrize("devices", [1, 4])
def test_donated_arguments_become_the_results_without_a_copy(devices: int) -> None:
    case, mesh = CASES[0], h200.mesh(devices, AxisType.Auto)
    in_place = partial(lambda *arrays: add_rms_norm_(*arrays, implementation="triton"))
    text = compiled(in_place, case, mesh, donate_argnums=(0, 1))
    assert " copy" not in text
    assert re.search(r"input_output_alias=\{ \{0\}: \(0, [^}]*\}, [a-z-]+\), \{1\}: \(1, ", text)
    assert re.search(
        rf"{launch.TARGET}[^\n]*output_to_operand_aliasing=\{{\{{0\}}: \(0, \{{\}}\), \{{1\}}: \(1, \{{\}}\)\}}", text
    )
    assert launches(text) == 1
    kept = compiled(in_place, case, mesh)
    assert len(re.findall(r" copy(?:-start)?\(", kept)) == 2, "what is not donated is copied first"


def test_a_program_compiles_after_its_target_was_named() -> None:
    """The architecture is fixed while lowering, though kernels on sharded arrays are compiled later."""
    case = CASES[0]
    with target("sm_90"):
        lowered = jax.jit(partial(forward, case)).lower(*shapes(case, h200.mesh(4, AxisType.Auto)))
    assert launches(str(lowered.compile().as_text())) == 1


@pytest.mark.parametrize("devices", [1, 4])
def test_code_for_other_devices_is_refused(devices: int) -> None:
    case, mesh = CASES[0], h200.mesh(devices, AxisType.Auto)
    for name in ("sm_80", "sm_100"):
        with target(name), pytest.raises(OptionError, match=f"target '{name}' was named, and the cuda devices .* are sm_90"):
            compiled(partial(forward, case), case, mesh)
    with target("gfx942"), pytest.raises(OptionError, match="target 'gfx942' is not an architecture of cuda"):
        compiled(partial(forward, case), case, mesh)


def refused(monkeypatch: pytest.MonkeyPatch, error: str, **changes: Callable[[Any], Any]) -> None:
    """Check that XLA refuses a launch some of whose fields are changed, or takes it where it does not read launches."""
    original = message.kernel
    monkeypatch.setattr(
        message,
        "kernel",
        lambda name, **fields: original(name, **fields | {field: change(fields[field]) for field, change in changes.items()}),
    )
    compile_and_expect(error)


def compile_and_expect(error: str) -> None:
    case, mesh = CASES[0], h200.mesh(1, AxisType.Auto)
    # a function of its own, so that JAX has not compiled it before
    function: Callable[..., Any] = lambda *given: forward(case, *given)  # noqa: E731
    if READS_LAUNCHES:
        with pytest.raises(jax.errors.JaxRuntimeError, match=error):
            compiled(function, case, mesh)
    else:
        assert launches(compiled(function, case, mesh)) == 1


@pytest.mark.parametrize(
    ("corrupt", "error"),
    [
        (lambda opaque: b"not compressed", "INVALID_ARGUMENT: Failed to uncompress"),
        (lambda opaque: opaque[:-10], "INVALID_ARGUMENT: Failed to uncompress"),
        (lambda opaque: zlib.compress(zlib.decompress(opaque)[:-3]), "INVALID_ARGUMENT: Failed to parse"),
        (lambda opaque: zlib.compress(b""), "INVALID_ARGUMENT: Unknown kernel call"),
    ],
    ids=["garbage", "cut", "cut_inside", "empty"],
)
def test_a_corrupted_message_is_refused(monkeypatch: pytest.MonkeyPatch, corrupt: Callable[[bytes], bytes], error: str) -> None:
    original = message.launch
    monkeypatch.setattr(message, "launch", lambda *given: corrupt(original(*given)))
    compile_and_expect(error)


def test_bad_assembly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the machine code is not there too, which jaxlib 0.11.1 and newer prefer."""
    refused(
        monkeypatch, r"ptxas.*Unknown modifier", ptx=lambda text: text.replace("ld.param", "ld.nonsense"), binary=lambda _: b""
    )


def test_assembly_of_a_version_to_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    later = partial(re.sub, r"\.version \S+", ".version 99.0")
    refused(monkeypatch, r"ptxas.*[Uu]nsupported \.version 99\.0", ptx=later, binary=lambda _: b"")


def test_the_assembly_alone_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for jaxlib older than 0.11.1; a newer one assembles it too where there is no machine code."""
    original = message.kernel
    monkeypatch.setattr(message, "kernel", lambda name, **fields: original(name, **fields | {"binary": b""}))
    case, mesh = CASES[0], h200.mesh(1, AxisType.Auto)
    assert launches(compiled(lambda *given: backward(case, *given), case, mesh)) == 3


def test_a_call_that_the_plugin_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TARGET", "no_such_call")
    case, mesh = CASES[0], h200.mesh(1, AxisType.Auto)
    with pytest.raises(jax.errors.JaxRuntimeError, match="NOT_FOUND: No FFI handler registered for no_such_call"):
        compiled(lambda *given: forward(case, *given), case, mesh)


@pytest.mark.parametrize(("arch", "newest"), [("sm_80", (8, 0)), ("sm_90", (8, 0)), ("sm_100", (8, 7)), ("sm_120", (8, 7))])
def test_the_assembly_is_of_an_old_version(arch: str, newest: tuple[int, int]) -> None:
    """CUDA 12.0 reads PTX 8.0, and CUDA 12.8, the first to know sm_100, reads 8.7; so does what JAX is built with."""
    problem = next(case for case in EVERY if case.name == "gpt_2").problem(platform="cuda", needs_grad=True)
    for kernel in [compile_forward(problem, arch), *compile_backward(problem, Wanted.by(problem), arch)]:
        version = re.search(r"^\.version (\d+)\.(\d+)$", kernel.assembly, re.MULTILINE)
        assert version
        assert (int(version[1]), int(version[2])) <= newest
        assert re.search(rf"^\.target {arch}\w?$", kernel.assembly, re.MULTILINE)
