# SPDX-License-Identifier: Apache-2.0
"""The machine code of the planned kernels for each architecture, compiled here without a GPU: no spills, 128-bit accesses, and
registers and shared memory for as many programs to a multiprocessor as the plan counts on.

The set covers every distinct configuration (kernel, constants, dtypes, warps) that is planned for a case of the table, and both
sides of every threshold of the plan, for both kinds, in bfloat16 and float32, with and without a residual, and for rows at
other strides with one. A configuration on the near side of a threshold, where registers are scarcest, is compiled for every
architecture; any other for one of NVIDIA's and one of AMD's, in turn, so that every kernel meets every architecture many times.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from normkit import plan
from normkit.compile import compile_backward, compile_forward, compile_step, gradient_dtypes, operand_dtypes
from normkit.errors import OptionError
from normkit.interface import Wanted
from normkit.plan import Step
from normkit.spec import NormSpec, Operand, Problem, describe

from .cases import CASES
from .machine_code import SHARED_LIMITS, Measured, measure, row_bytes
from .resources import registers, shared_memory

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

ARCHITECTURES = {"cuda": ("sm_80", "sm_90", "sm_100"), "rocm": ("gfx942", "gfx950")}
# The longest rows of each form of the backward and of the forward pass, by dtype.
LONGEST = {
    "bfloat16": (plan.BACKWARD_LONGEST_ROW, plan.BACKWARD_LONGEST_WITH_DBIAS, 16384, plan.FORWARD_LONGEST_ROW),
    "float32": (plan.BACKWARD_LONGEST_ROW, plan.BACKWARD_LONGEST_WITH_DBIAS, plan.FORWARD_LONGEST_ROW // 2),
}
# Several rows in a program, the first size with one, and rows longer than a program holds.
OTHERS = (512, plan.TILE_ELEMENTS // 2, plan.TILE_ELEMENTS, 9000, 2**16, 2**20)


class Configuration(NamedTuple):
    """One kernel to compile."""

    name: str
    arch: str
    step: Step
    dtypes: dict[str, str | None]

    @property
    def aligned(self) -> bool:
        """Whether every row of every array starts at a multiple of 16 bytes."""
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
        hidden = int(self.step.constants["HIDDEN"])
        return all(hidden * sizes[dtype] % 16 == 0 for dtype in self.dtypes.values() if dtype)


def _at(size: int, platform: str, kind: str, dtype: str, residual: bool, layout: str = "contiguous") -> Problem:
    rows, row = Operand((64, size), dtype), Operand((size,), dtype)
    bias = row if kind == "layer" else None
    facts: dict[str, Any] = {"platform": platform, "layout": layout, "needs_grad": True}
    return describe(NormSpec(kind), rows, rows if residual else None, row, bias, **facts)


def _problems(platform: str) -> Iterator[tuple[str, bool, Problem]]:
    """Each problem with its name, and whether every architecture is to compile it."""
    for dtype, longest in LONGEST.items():
        for size, kind, residual in product((*longest, *OTHERS), ("rms", "layer"), (False, True)):
            name = f"{size}_{kind}_{dtype}{'_residual' * residual}"
            yield name, size in longest, _at(size, platform, kind, dtype, residual)
    for case in CASES:
        problem = case.problem(platform=platform, needs_grad=True)
        if plan.supports(problem) is None:
            yield case.name, False, problem
    for dtype, longest in LONGEST.items():
        for size, kind in product((*longest, *OTHERS), ("rms", "layer")):
            yield f"{size}_{kind}_{dtype}_residual_strided", False, _at(size, platform, kind, dtype, True, layout="rows")


def _steps(problem: Problem) -> Iterator[tuple[Step, Mapping[str, str | None]]]:
    wanted = Wanted.by(problem)
    planned, gradients = plan.backward_plan(problem, wanted), gradient_dtypes(problem, wanted)
    yield plan.forward_plan(problem), operand_dtypes(problem)
    for step in planned.steps:
        yield step, gradients
    for gradient, parameter in (("dweight", problem.weight_dtype), ("dbias", problem.bias_dtype)):
        if gradients[gradient]:
            yield planned.total, {"partial": gradients[gradient], "total": parameter}


def configurations() -> Iterator[Configuration]:
    """Every configuration to compile, once for each of its architectures."""
    from normkit import kernels

    for platform, architectures in ARCHITECTURES.items():
        distinct: dict[tuple[object, ...], int] = {}
        for name, everywhere, problem in _problems(platform):
            for step, dtypes in _steps(problem):
                pointers = [n.removesuffix("_ptr") for n in getattr(kernels, step.kernel).arg_names if n.endswith("_ptr")]
                own = {pointer: dtypes[pointer] for pointer in pointers}
                key = (step.kernel, *step.constants.items(), step.num_warps, *own.items())
                turn = distinct.setdefault(key, len(distinct))
                if turn == len(distinct) - 1:
                    chosen = architectures if everywhere else (architectures[turn % len(architectures)],)
                    yield from (Configuration(name, arch, step, own) for arch in chosen)


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Configuration], Measured]]:
    """Compile the configurations of the selected tests, as many at once as there are cores, and return each when asked for."""
    futures: dict[int, Future[Measured]] = {}
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton_cache")))
        for item in request.session.items:
            if item.path == Path(__file__) and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
                wanted = item.callspec.params.get("configuration")
                if isinstance(wanted, Configuration):
                    futures[id(wanted)] = pool.submit(measure, wanted.step, wanted.dtypes, wanted.arch)
        yield lambda configuration: futures[id(configuration)].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("configuration", [pytest.param(c, id=f"{c.arch}-{c.step.kernel}-{c.name}") for c in configurations()])
def test_machine_code(configuration: Configuration, measured: Callable[[Configuration], Measured]) -> None:
    result = measured(configuration)
    step, platform = configuration.step, "rocm" if configuration.arch.startswith("gfx") else "cuda"
    assert result.spilled == 0
    # odd rows move an element at a time, and take more registers
    assert not configuration.aligned or result.registers <= registers(step, platform)
    assert result.shared <= min(SHARED_LIMITS[configuration.arch], shared_memory(step, platform))
    assert result.parameters == result.expected_parameters
    if configuration.aligned:
        _assert_vectorised(configuration, result)


def _assert_vectorised(configuration: Configuration, result: Measured) -> None:
    """All rows move 128 bits at a time. What need not: the statistics of a row, a thread's share of a total, and a parameter
    (or its gradient) that is spread over all threads of a small block."""
    step, dtypes = configuration.step, configuration.dtypes
    threads = step.num_warps * (32 if configuration.arch.startswith("sm_") else 64)
    moved = row_bytes(step, dtypes)
    assert result.load.wide_bytes * threads >= moved["load"]
    assert result.store.wide_bytes * threads >= moved["store"]
    forward, rows = step.kernel.startswith("forward"), int(step.constants.get("BLOCK_M", 1))
    statistics = rows * _present(dtypes, "mean", "rstd")
    blocks = -(-int(step.constants.get("BLOCKS", 1)) // 256)
    shares = _present(dtypes, "x_hat_g", "g") * max(rows, blocks)
    small = rows > 1
    assert result.load.narrow <= (0 if forward else statistics + 2 * shares) + small * _present(dtypes, "weight", "bias")
    assert result.store.narrow <= (statistics if forward else shares) + small * _present(dtypes, "dweight", "dbias", "total")


def _present(dtypes: dict[str, str | None], *names: str) -> int:
    return sum(dtypes.get(name) is not None for name in names)


def test_no_vector_crosses_the_end_of_an_odd_row() -> None:
    step = plan.forward_plan(_at(4095, "cuda", "layer", "float32", residual=True))
    dtypes = operand_dtypes(_at(4095, "cuda", "layer", "float32", residual=True))
    result = measure(step, dtypes, "sm_90")
    assert result.load.wide_bytes == result.store.wide_bytes == 0
    assert result.load.narrow > 0 and result.store.narrow > 0


@pytest.mark.parametrize(("arch", "size"), [("sm_90", 8192), ("gfx942", 16384)])
def test_too_few_warps_are_seen_to_spill(arch: str, size: int) -> None:
    problem = _at(size, "cuda", "rms", "bfloat16", residual=False)
    step = plan.forward_plan(problem)
    few = Step(step.kernel, step.grid, step.constants, num_warps=1)
    result = measure(few, operand_dtypes(problem), arch)
    assert result.spilled > 0


def test_all_kernels_of_a_problem_are_compiled_in_order() -> None:
    problem = _at(2 * plan.FORWARD_LONGEST_ROW, "cuda", "layer", "float32", residual=True)
    forward = compile_forward(problem, "sm_90")
    backward = compile_backward(problem, Wanted.by(problem), "sm_90")
    names = ["forward_long", "backward_columns", "backward_long", "sum_partials", "sum_partials"]
    assert [kernel.name for kernel in (forward, *backward)] == names
    assert all(kernel.binary.startswith(b"\x7fELF") for kernel in (forward, *backward))


@pytest.mark.parametrize(
    ("arch", "barrier"),
    [
        ("sm_90", r"bar\.sync\s+0;"),
        # the waves of a program share one L1 cache, which keeps their order, if there is no tgsplit (LLVM: gfx90a, gfx942)
        ("gfx942", r"s_barrier$"),
        ("gfx950", r"s_barrier$"),
        # here they have two
        ("gfx1100", r"s_waitcnt_vscnt null, 0x0\s+s_barrier\s+buffer_gl0_inv"),
    ],
)
def test_what_a_program_has_stored_is_there_to_be_read_back(arch: str, barrier: str) -> None:
    problem = _at(2**16, "cuda" if arch.startswith("sm_") else "rocm", "rms", "float32", residual=True)
    step = plan.forward_plan(problem)
    assert step.constants["READ_BACK"]
    assembly = compile_step(step, operand_dtypes(problem), arch).assembly
    code = re.sub(r"^\s*(\.loc|;|//).*\n", "", assembly, flags=re.MULTILINE)
    found = re.finditer(rf"(?P<L>ld\.global|global_load)|(?P<S>st\.global|global_store)|(?P<B>{barrier})", code, re.MULTILINE)
    # statistics are stored between the passes, and then comes a barrier of its own
    assert re.fullmatch(r"[LS]+B+SB[LS]+", "".join(str(event.lastgroup) for event in found))
    assert arch not in ("gfx942", "gfx950") or ".amdhsa_tg_split 0" in assembly


@pytest.mark.parametrize("arch", ["", "sm90", "sm_", "sm_90a", "volta", "90"])
def test_an_unknown_architecture_is_refused(arch: str) -> None:
    with pytest.raises(OptionError, match="not known"):
        compile_forward(_at(64, "cuda", "rms", "float32", residual=False), arch)
