# SPDX-License-Identifier: Apache-2.0
"""How a problem is laid out on a GPU: which kernels, which blocks, how many warps. Pure functions of plain data.

Nothing but the grid depends on the number of rows, and nothing at all on the number of multiprocessors: a row's bits are the
same alone and in any batch, on any device of one architecture. Nor does y's layout depend on whether a backward may follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import numpy_dtype
from .interface import Rejected, Wanted
from .spec import Problem

# A block of about this many elements gives every thread of a program work enough to hide the latency of memory.
TILE_ELEMENTS = 2048
MAX_THREADS = 1024
# HIP counts the threads of a launch along an axis, not its programs, in 32 bits; the last program may have fewer rows.
MOST_THREADS_OF_A_LAUNCH = 2**32 - 2 * MAX_THREADS
# Elements for each thread: two to four 128-bit loads of each operand. On NVIDIA's, rows of this size and longer have 32: what a
# thread needs besides is then shared by more, and more bytes are on their way at once (bfloat16 rows of 8192, RMSNorm forward:
# 59 registers, 4 programs to a multiprocessor; with 16 each 40, and 3). AMD's have registers enough either way.
ELEMENTS_EACH, MANY_ELEMENTS_EACH = 16, 32
MANY_FROM = 8192
# The longest rows that a program holds: with 1024 threads of 64 registers, of which 32 hold h. Up to half of that there is
# room for the statistics of h and of h rounded; then h is computed again, from caches, where both are needed.
FORWARD_LONGEST_ROW = 32768
FORWARD_LONGEST_WITH_BOTH = 16384
# Longer rows are read in blocks by 1024 threads, which leaves room for one program only, so that the rows in flight fit into
# the L2 cache as long as possible: of 64Ki bfloat16 elements, x and residual on 132 multiprocessors are 34 MB. LayerNorm has
# two sums in each lane.
LONG_ROW_BLOCK = {"rms": 16384, "layer": 8192}
# The longest rows of which the backward pass holds dy and x_hat. With one sum over rows, dweight, two programs share a
# multiprocessor if they look twice at rows of 8192; with dbias not even then, and with 32-bit values nothing longer fits.
BACKWARD_LONGEST_ROW, BACKWARD_LONGEST_WITH_DBIAS = 4096, 8192
# The most bytes of dy and h that one program looks at twice: they are still in the L1 cache.
BACKWARD_TWICE_BYTES = 65536
# The block of `backward_columns`: several rows at once, and 128-bit loads of 16-bit elements by every thread of a warp.
COLUMNS_BLOCK = (4, 512)
LONG_BACKWARD_BLOCK = 4096
# A part has at least so many rows that its partial sums, written and read, are this share of its rows' bytes; but the parts
# are not to be fewer than it takes to occupy any GPU: programs of long rows, or so many that they hold this many elements.
# Four times as many parts, so that all multiprocessors end together, and then the parts grow.
PARTIAL_SUMS_SHARE = 1 / 16
FEWEST_PARTS, ELEMENTS_HELD = 128, 2**20
MOST_TO_FEWEST = 4
# Elements of the block of `sum_partials`, and its fewest and most columns: 32 and 128 bytes.
PARTIALS_ELEMENTS, PARTIALS_COLUMNS = 4096, (8, 32)
# Registers that a thread may use where rows are aligned: found by compiling, and kept so by tests/test_ahead_of_time.py. They
# say how many programs share a multiprocessor. Backward, a thread holds one sum or two for each of its elements, besides a row.
FEW_REGISTERS, MANY_REGISTERS, MOST_REGISTERS = 64, 128, 168
BACKWARD_REGISTERS = {"backward_rows": 96, "backward_columns": 112, "backward_long": 80}


@dataclass(frozen=True)
class Step:
    """One kernel launch.

    Attributes:
        kernel: the kernel's name in `normkit.kernels`.
        grid: number of programs along each axis.
        constants: its tl.constexpr arguments.
        num_warps: warps per program.
        programs: how many programs are to share a multiprocessor; `tests/resources.py` says what each may then use.
    """

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, int | str | bool]
    num_warps: int
    programs: int = 1


@dataclass(frozen=True)
class BackwardPlan:
    """The steps of a backward pass, and the parts that the rows are dealt to.

    Attributes:
        parts: number of partial sums of dweight and dbias.
        rows_per_program: rows in each part but the last, which may have fewer.
        blocks: number of shares that each row's sums are handed from the first step to the second in; 0 with one step.
        steps: the launches that compute dx, dresidual and the partial sums, in order.
        total: the launch that adds up the partial sums; once for dweight, once for dbias.
    """

    parts: int
    rows_per_program: int
    blocks: int
    steps: tuple[Step, ...]
    total: Step


def supports(problem: Problem) -> Rejected | None:
    """Say whether the Triton kernels can compute a problem, on a platform that has Triton."""
    if "float64" in (*problem.dtypes, problem.out_dtype, problem.residual_out_dtype):
        return Rejected("the Triton kernels compute in float32, which is not enough for float64")
    if problem.hidden_size > 2**30:
        return Rejected(f"the Triton kernels index a row with 32 bits, and hidden_size is {problem.hidden_size}")
    threads = problem.rows * _next_power_of_2(problem.hidden_size) // ELEMENTS_EACH
    if problem.platform == "rocm" and threads > MOST_THREADS_OF_A_LAUNCH:
        return Rejected(f"a launch on ROCm has fewer than 2**32 threads, and {problem.rows} such rows would take {threads}")
    if problem.in_place and problem.layout == "strided":
        return Rejected("in place, the Triton kernels need unit stride along the row, and rows reached by two nested loops")
    return None


def forward_plan(problem: Problem) -> Step:
    """Plan the forward pass.

    Example:
        >>> from normkit.spec import NormSpec, Operand, describe
        >>> step = forward_plan(describe(NormSpec("rms"), Operand((64, 4096), "bfloat16")))
        >>> step.kernel, step.grid, step.constants["BLOCK_N"], step.num_warps, step.programs
        ('forward_rows', (64,), 4096, 8, 4)
    """
    rounding = problem.spec.rounding or "sum"
    constants: dict[str, int | str | bool] = {
        "HIDDEN": problem.hidden_size,
        "SUBTRACT_MEAN": problem.spec.subtract_mean,
        "ROUNDING": rounding,
        "CONTIGUOUS": problem.layout == "contiguous",
        "IN_PLACE": problem.in_place,
    }
    columns = _next_power_of_2(problem.hidden_size)
    rounded = rounding == "sum" and problem.residual_out_dtype not in (None, "float32")
    narrow = all(_bytes(dtype) == 2 for dtype in problem.dtypes)
    if columns <= (FORWARD_LONGEST_ROW if narrow else FORWARD_LONGEST_ROW // 2):
        rows = max(1, TILE_ELEMENTS // columns)
        again = problem.needs_grad and rounded and columns > FORWARD_LONGEST_WITH_BOTH
        constants |= {"BLOCK_M": rows, "BLOCK_N": columns, "AGAIN": again}
        many = columns >= MANY_FROM
        more = problem.spec.subtract_mean or problem.bias_dtype is not None or not narrow
        registers = MANY_REGISTERS if many and more else FEW_REGISTERS
        return _step(problem, "forward_rows", (_ceil(problem.rows, rows),), constants, _each(problem, many), registers)
    read = _bytes(problem.x_dtype) + _bytes(problem.residual_dtype)
    read_back = problem.residual_out_dtype is not None and not rounded and _bytes(problem.residual_out_dtype) < read
    # it takes a barrier that orders global memory within a program, which the code for NVIDIA's and AMD's is known to have
    read_back = read_back and problem.platform != "xpu"
    block = LONG_ROW_BLOCK[problem.spec.kind]
    constants |= {"BLOCK_N": block, "READ_BACK": read_back, "TWO_STATISTICS": problem.needs_grad and rounded}
    return _step(problem, "forward_long", (problem.rows,), constants, block // MAX_THREADS, FEW_REGISTERS)


def backward_plan(problem: Problem, wanted: Wanted) -> BackwardPlan:
    """Plan the backward pass.

    Example:
        >>> from normkit.spec import NormSpec, Operand, describe
        >>> x, weight = Operand((4096, 4096), "bfloat16"), Operand((4096,), "bfloat16")
        >>> plan = backward_plan(describe(NormSpec("rms"), x, x, weight), Wanted(True, True, True, False))
        >>> plan.parts, plan.rows_per_program, [step.kernel for step in plan.steps]
        (256, 16, ['backward_rows'])
    """
    constants: dict[str, int | str | bool] = {
        "HIDDEN": problem.hidden_size,
        "SUBTRACT_MEAN": problem.spec.subtract_mean,
        "CONTIGUOUS": problem.layout == "contiguous",
    }
    columns = _next_power_of_2(problem.hidden_size)
    item = max(_bytes(problem.out_dtype), _bytes(problem.h_dtype))
    two = problem.weight_dtype is not None and problem.bias_dtype is not None
    shape: dict[str, int | str | bool]
    if columns <= (BACKWARD_LONGEST_WITH_DBIAS if two and item == 2 else BACKWARD_LONGEST_ROW):
        rows = max(1, TILE_ELEMENTS // columns)
        parts, rows_per_program = _parts(problem, rows, columns)
        shape = {"BLOCK_M": rows, "BLOCK_N": columns}
        registers = BACKWARD_REGISTERS["backward_rows"]
        if item > 2 or two or problem.spec.subtract_mean:
            registers = MOST_REGISTERS if item > 2 and two else MANY_REGISTERS
        steps = (_step(problem, "backward_rows", (parts,), constants | shape, ELEMENTS_EACH, registers),)
    elif _looks_twice(problem, columns, item, two):
        parts, rows_per_program = _parts(problem, 1, columns)
        # with two sums a thread has registers for fewer elements at a time
        pieces = 4 if (two or problem.spec.subtract_mean) and _warp_size(problem) == 32 else 2
        shape = {"BLOCK_N": columns // pieces, "PIECES": pieces}
        each = _each(problem, many=item == 2)
        steps = (_step(problem, "backward_twice", (parts,), constants | shape, each, MANY_REGISTERS),)
    else:
        return _long_backward_plan(problem, wanted, constants)
    return BackwardPlan(parts, rows_per_program, 0, steps, _total_step(problem))


def _looks_twice(problem: Problem, columns: int, item: int, two: bool) -> bool:
    """Say whether a program has caches for a row, to look at it twice, and registers for its sums."""
    # two sums of 16384 take half of all registers: with a weight of 32 bits the rest is too little, and for RMSNorm as well
    crowded = two and columns > BACKWARD_LONGEST_WITH_DBIAS and _warp_size(problem) == 32
    fits = problem.spec.subtract_mean and _bytes(problem.weight_dtype) == 2
    return columns * 2 * item <= BACKWARD_TWICE_BYTES and (fits or not crowded)


def _long_backward_plan(problem: Problem, wanted: Wanted, constants: dict[str, int | str | bool]) -> BackwardPlan:
    rows, columns = COLUMNS_BLOCK
    blocks = _ceil(problem.hidden_size, columns)
    parts, rows_per_program = _parts(problem, rows, columns, blocks)
    shape: dict[str, int | str | bool] = {"BLOCK_M": rows, "BLOCK_N": columns}
    # the second axis of a CUDA grid has at most 65535 programs
    registers = BACKWARD_REGISTERS["backward_columns"]
    sums = _step(problem, "backward_columns", (blocks, parts), constants | shape, ELEMENTS_EACH, registers)
    if not wanted.dx and not wanted.dresidual:
        return BackwardPlan(parts, rows_per_program, 0, (sums,), _total_step(problem))
    shape = {"BLOCKS": blocks, "BLOCK_N": LONG_BACKWARD_BLOCK}
    grid = (problem.rows * _ceil(problem.hidden_size, LONG_BACKWARD_BLOCK),)
    registers = BACKWARD_REGISTERS["backward_long"]
    dh = _step(problem, "backward_long", grid, constants | shape, ELEMENTS_EACH, registers)
    return BackwardPlan(parts, rows_per_program, blocks, (sums, dh), _total_step(problem))


def _parts(problem: Problem, rows: int, columns: int, blocks: int = 1) -> tuple[int, int]:
    """Return how many parts the rows are dealt to, and how many rows each has, a multiple of those that a block has."""
    fewest = max(1, max(FEWEST_PARTS, ELEMENTS_HELD // (rows * columns)) // blocks)
    moved = {problem.x_dtype, problem.residual_dtype or problem.x_dtype}
    row_bytes = sum(map(_bytes, (problem.out_dtype, problem.h_dtype, problem.residual_out_dtype, *moved)))
    sums = (problem.weight_dtype is not None) + (problem.bias_dtype is not None)
    enough = _ceil(int(2 * 4 * sums / PARTIAL_SUMS_SHARE), row_bytes)
    each = max(1, _ceil(problem.rows, MOST_TO_FEWEST * fewest), min(enough, _ceil(problem.rows, fewest)))
    each = _ceil(each, rows) * rows
    return _ceil(problem.rows, each), each


def _total_step(problem: Problem) -> Step:
    fewest, most = PARTIALS_COLUMNS
    # so many programs that they occupy a GPU, whatever the size
    columns = min(most, max(fewest, _next_power_of_2(problem.hidden_size) // FEWEST_PARTS))
    constants: dict[str, int | str | bool] = {"HIDDEN": problem.hidden_size}
    constants |= {"BLOCK_M": PARTIALS_ELEMENTS // columns, "BLOCK_N": columns}
    return _step(problem, "sum_partials", (_ceil(problem.hidden_size, columns),), constants, ELEMENTS_EACH, FEW_REGISTERS)


def _step(
    problem: Problem, kernel: str, grid: tuple[int, ...], constants: dict[str, int | str | bool], each: int, registers: int
) -> Step:
    """Return a step with warps enough for its block, of whose elements each thread has some and for which it has registers."""
    elements = int(constants["BLOCK_N"]) * int(constants.get("BLOCK_M", 1)) * int(constants.get("PIECES", 1))
    warp_size = _warp_size(problem)
    num_warps = min(MAX_THREADS, max(warp_size, elements // each)) // warp_size
    if problem.platform == "rocm":
        # each of the four parts of a compute unit has 512 registers of 64 lanes: of four waves, three or two
        waves = 16 if registers < MANY_REGISTERS else 12 if registers == MANY_REGISTERS else 8
        programs = waves // num_warps
    else:
        programs = 65536 // (32 * num_warps * registers)
    return Step(kernel, grid, constants, num_warps, max(1, programs))


def _each(problem: Problem, many: bool) -> int:
    return MANY_ELEMENTS_EACH if many and _warp_size(problem) == 32 else ELEMENTS_EACH


def _warp_size(problem: Problem) -> int:
    return 64 if problem.platform == "rocm" else 32


def _bytes(dtype: str | None) -> int:
    return 0 if dtype is None else numpy_dtype(dtype).itemsize


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
