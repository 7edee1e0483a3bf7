# SPDX-License-Identifier: Apache-2.0
"""Backward, of rows longer than a program holds, in two launches, each of which reads dy and h once.

`backward_columns` goes down blocks of columns: it sums dweight and dbias over a part of the rows, and each row's share of
x_hat g and of g over the block. `backward_long` adds up the shares of a row and computes dh. Definitions as in `backward.py`.
"""

import triton
import triton.language as tl

from .backward import load_or_zero, look, look_at_rows
from .rows import row_start, store_rows


@triton.jit(do_not_specialize=["rows", "rows_per_program", "inner_rows"])
def backward_columns(
    dy_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    x_hat_g_ptr,  # (rows, blocks) float32, contiguous, or None
    g_ptr,  # the same, None for RMSNorm
    dweight_ptr,
    dbias_ptr,
    rows,
    rows_per_program,
    inner_rows,
    dy_outer,
    dy_inner,
    h_outer,
    h_inner,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Each program takes one block of columns of rows_per_program rows, BLOCK_M at a time."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    program = tl.program_id(1).to(tl.int64)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # the sum of dy alone needs nothing of h
    needed_ptr = None if dweight_ptr is None and x_hat_g_ptr is None else h_ptr
    pointers, statistics = (dy_ptr, needed_ptr, weight_ptr), (mean_ptr, rstd_ptr)
    strides = (dy_outer, dy_inner, h_outer, h_inner)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    while first < last:
        row = first + tl.arange(0, BLOCK_M)
        in_rows = row < last
        dy, x_hat, g, _, _ = look_at_rows(
            pointers, statistics, strides, row, in_rows, column, inner_rows, weight_offset, HIDDEN, SUBTRACT_MEAN, CONTIGUOUS
        )
        if dweight_ptr is not None:
            dweight += dy * x_hat
        dbias += dy
        if x_hat_g_ptr is not None:
            store_rows(x_hat_g_ptr, tl.sum(x_hat * g, axis=1), row * blocks + block, in_rows, "")
            store_rows(g_ptr, tl.sum(g, axis=1), row * blocks + block, in_rows, "")
        first += BLOCK_M
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    store_rows(dweight_ptr, tl.sum(dweight, axis=0), program * HIDDEN + columns, columns < HIDDEN, "")
    store_rows(dbias_ptr, tl.sum(dbias, axis=0), program * HIDDEN + columns, columns < HIDDEN, "")


@triton.jit
def _total(ptr, row, BLOCKS: tl.constexpr):
    """Sum the shares of one row, in a fixed order."""
    shares = tl.zeros((256,), tl.float32)
    first = 0
    while first < BLOCKS:
        block = first + tl.arange(0, 256)
        shares += tl.load(ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
        first += 256
    return tl.sum(shares, axis=0)


@triton.jit(do_not_specialize=["rows", "inner_rows"])
def backward_long(
    dy_ptr,
    dresidual_out_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    x_hat_g_ptr,
    g_ptr,
    dx_ptr,
    dresidual_ptr,
    rows,
    inner_rows,
    dy_outer,
    dy_inner,
    dresidual_out_outer,
    dresidual_out_inner,
    h_outer,
    h_inner,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Each program computes one block of dh, from the last row to the first: the L2 cache has what was read last."""
    CHUNKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    row = rows - 1 - (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = (tl.program_id(0) % CHUNKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < HIDDEN
    dy_offset = row_start(row, inner_rows, dy_outer, dy_inner, HIDDEN, CONTIGUOUS) + column
    h_offset = row_start(row, inner_rows, h_outer, h_inner, HIDDEN, CONTIGUOUS) + column
    stream = row_start(row, inner_rows, dresidual_out_outer, dresidual_out_inner, HIDDEN, CONTIGUOUS) + column
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if SUBTRACT_MEAN else 0.0
    pointers, offsets = (dy_ptr, h_ptr, weight_ptr), (dy_offset, h_offset)
    _, x_hat, g = look(pointers, offsets, column, mask, mean, rstd, weight_offset, SUBTRACT_MEAN, "evict_first")
    dresidual_out = load_or_zero(dresidual_out_ptr, stream, mask)
    dh = g - x_hat * (_total(x_hat_g_ptr, row, BLOCKS) / HIDDEN)
    if SUBTRACT_MEAN:
        dh -= _total(g_ptr, row, BLOCKS) / HIDDEN
    dh = dh * rstd + dresidual_out.to(tl.float32)
    store_rows(dx_ptr, dh, row * HIDDEN + column, mask, "")
    store_rows(dresidual_ptr, dh, row * HIDDEN + column, mask, "")
