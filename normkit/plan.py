# SPDX-License-Identifier: Apache-2.0
"""How a problem is laid out on a GPU: which kernels, which blocks, how many warps. Pure functions of plain data.

Nothing but the grid depends on the number of rows, and nothing at all on the number of multiprocessors: a row's bits are the
same alone and in any batch, on any device of one architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import numpy_dtype
from .interface import Rejected, Wanted
from .spec import Problem

# A block of about this many elements gives every thread of a program work enough to hide the latency of memory.
TILE_ELEMENTS = 2048
MAX_THREADS = 1024
# The longest rows that a program can hold in registers without spilling on any of sm_80, sm_90, sm_100, gfx942 and gfx950
# (found by compiling; tests/test_ahead_of_time.py keeps it so). The forward holds h and h rounded, and loads the weight; the
# backward holds dy, x_hat and two sums, and so many bytes that it reads of a row: dy, h, dresidual_out.
FORWARD_LONGEST_ROW = 16384
BACKWARD_LONGEST_ROW = 8192
BACKWARD_LONGEST_BYTES = 81920
# Longer rows are read in blocks of this many elements: several programs then share a multiprocessor, so that one reads while
# another reduces. With more, the compiler unrolls the loop over a row of a few blocks, and spills.
LONG_ROW_BLOCK = 4096
# Parts that the rows are dealt to in the backward pass: enough for every multiprocessor of any GPU to have several, few
# enough that the partial sums are small beside the rows themselves.
MAX_PARTS = 512
# Columns that each thread of the one warp of a `backward_columns` program sums: a 128-bit load of 16-bit elements.
COLUMNS_PER_THREAD = 8
# The tile of `sum_partials`.
PARTIALS_TILE = (16, 128)


@dataclass(frozen=True)
class Step:
    """One kernel launch.

    Attributes:
        kernel: the kernel's name in `normkit.kernels`.
        grid: number of programs along each axis.
        constants: its tl.constexpr arguments.
        num_warps: warps per program.
    """

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, int | str | bool]
    num_warps: int


@dataclass(frozen=True)
class BackwardPlan:
    """The steps of a backward pass, and the parts that the rows are dealt to.

    Attributes:
        parts: number of partial sums of dweight and dbias.
        rows_per_program: rows in each part but the last, which may have fewer.
        steps: the launches that compute dx, dresidual and the partial sums, in order.
        total: the launch that adds up the partial sums; once for dweight, once for dbias.
    """

    parts: int
    rows_per_program: int
    steps: tuple[Step, ...]
    total: Step


def supports(problem: Problem) -> Rejected | None:
    """Say whether the Triton kernels can compute a problem, on a platform that has Triton."""
    if "float64" in (*problem.dtypes, problem.out_dtype, problem.residual_out_dtype):
        return Rejected("the Triton kernels compute in float32, which is not enough for float64")
    if problem.hidden_size > 2**30:
        return Rejected(f"the Triton kernels index a row with 32 bits, and hidden_size is {problem.hidden_size}")
    if problem.in_place and problem.layout == "strided":
        return Rejected("in place, the Triton kernels need unit stride along the row, and rows reached by two nested loops")
    return None


def forward_plan(problem: Problem) -> Step:
    """Plan the forward pass.

    Example:
        >>> from normkit.spec import NormSpec, Operand, describe
        >>> step = forward_plan(describe(NormSpec("rms"), Operand((64, 4096), "bfloat16")))
        >>> step.kernel, step.grid, step.constants["BLOCK_N"], step.num_warps
        ('forward_rows', (64,), 4096, 8)
    """
    constants: dict[str, int | str | bool] = {
        "HIDDEN": problem.hidden_size,
        "SUBTRACT_MEAN": problem.spec.subtract_mean,
        "ROUNDING": problem.spec.rounding or "sum",
        "CONTIGUOUS": problem.layout == "contiguous",
        "IN_PLACE": problem.in_place,
    }
    block = _block(problem, FORWARD_LONGEST_ROW)
    if block.whole_rows:
        constants |= {"BLOCK_M": block.rows, "BLOCK_N": block.columns}
        return Step("forward_rows", (_ceil(problem.rows, block.rows),), constants, block.num_warps)
    return Step("forward_long", (problem.rows,), constants | {"BLOCK_N": block.columns}, block.num_warps)


def backward_plan(problem: Problem, wanted: Wanted) -> BackwardPlan:
    """Plan the backward pass.

    Example:
        >>> from normkit.spec import NormSpec, Operand, describe
        >>> plan = backward_plan(describe(NormSpec("rms"), Operand((4096, 4096), "bfloat16")), Wanted(True, False, True, False))
        >>> plan.parts, plan.rows_per_program, [step.kernel for step in plan.steps]
        (512, 8, ['backward_rows'])
    """
    constants: dict[str, int | str | bool] = {
        "HIDDEN": problem.hidden_size,
        "SUBTRACT_MEAN": problem.spec.subtract_mean,
        "CONTIGUOUS": problem.layout == "contiguous",
    }
    read = sum(map(_bytes, (problem.out_dtype, problem.h_dtype, problem.residual_out_dtype)))
    block = _block(problem, min(BACKWARD_LONGEST_ROW, BACKWARD_LONGEST_BYTES // read))
    rows_per_program = max(block.rows, _ceil(problem.rows, MAX_PARTS * block.rows) * block.rows)
    parts = _ceil(problem.rows, rows_per_program)
    if block.whole_rows:
        shape: dict[str, int | str | bool] = {"BLOCK_M": block.rows, "BLOCK_N": block.columns}
        steps: tuple[Step, ...] = (Step("backward_rows", (parts,), constants | shape, block.num_warps),)
    else:
        steps = ()
        if wanted.dx or wanted.dresidual:
            steps += (Step("backward_long", (problem.rows,), constants | {"BLOCK_N": block.columns}, block.num_warps),)
        if wanted.dweight or wanted.dbias:
            columns = COLUMNS_PER_THREAD * _warp_size(problem)
            # the second axis of a CUDA grid has at most 65535 programs
            grid = (_ceil(problem.hidden_size, columns), parts)
            steps += (Step("backward_columns", grid, constants | {"BLOCK_N": columns}, num_warps=1),)
    tile_rows, tile_columns = PARTIALS_TILE
    total = Step(
        "sum_partials",
        (_ceil(problem.hidden_size, tile_columns),),
        {"HIDDEN": problem.hidden_size, "BLOCK_M": tile_rows, "BLOCK_N": tile_columns},
        _num_warps(problem, tile_rows * tile_columns),
    )
    return BackwardPlan(parts, rows_per_program, steps, total)


@dataclass(frozen=True)
class _Block:
    rows: int
    columns: int
    num_warps: int
    whole_rows: bool


def _block(problem: Problem, longest_row: int) -> _Block:
    columns = _next_power_of_2(problem.hidden_size)
    if columns > longest_row:
        return _Block(1, LONG_ROW_BLOCK, _num_warps(problem, LONG_ROW_BLOCK), whole_rows=False)
    rows = max(1, TILE_ELEMENTS // columns)
    return _Block(rows, columns, _num_warps(problem, rows * columns), whole_rows=True)


def _num_warps(problem: Problem, elements: int) -> int:
    """Return enough warps that a thread has 16 elements (two to four 128-bit loads of each operand) while there are threads."""
    threads = min(MAX_THREADS, max(_warp_size(problem), elements // 16))
    return threads // _warp_size(problem)


def _warp_size(problem: Problem) -> int:
    return 64 if problem.platform == "rocm" else 32


def _bytes(dtype: str | None) -> int:
    return 0 if dtype is None else numpy_dtype(dtype).itemsize


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
