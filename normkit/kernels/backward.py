# SPDX-License-Identifier: Apache-2.0
"""Backward: with x_hat = (h - mean) rstd and g = dy (weight_offset + weight),

    dh = rstd (g - x_hat mean(x_hat g) - mean(g)) + dresidual_out      (mean(g) for LayerNorm only)
    dweight = sum over rows of dy x_hat,   dbias = sum over rows of dy

dx and dresidual are dh. The rows are dealt to programs in fixed, equal parts; each part's sums go to its own row of a float32
array, and `sum_partials` adds these up in a fixed order: dweight and dbias are the same bits in every run.
"""

import triton
import triton.language as tl

from .rows import load_weight, row_start


@triton.jit
def _x_hat(h_ptr, offset, mean, rstd, mask, SUBTRACT_MEAN: tl.constexpr):
    h = tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if SUBTRACT_MEAN:
        h = tl.where(mask, h - mean, 0.0)
    return h * rstd


@triton.jit
def _weighted(dy, weight_ptr, weight_offset, column, mask):
    g = dy.to(tl.float32)
    if weight_ptr is not None:
        g = g * load_weight(weight_ptr, weight_offset, column, mask)
    return g


@triton.jit
def _store_dh(dh, dresidual_out_ptr, dresidual_out_offset, dx_ptr, dresidual_ptr, offset, mask):
    if dresidual_out_ptr is not None:
        dh += tl.load(dresidual_out_ptr + dresidual_out_offset, mask=mask, other=0.0).to(tl.float32)
    if dx_ptr is not None:
        tl.store(dx_ptr + offset, dh.to(dx_ptr.dtype.element_ty), mask=mask)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offset, dh.to(dresidual_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_part(part_ptr, part, offset, mask):
    if part_ptr is not None:
        tl.store(part_ptr + offset, part, mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "inner_rows"])
def backward_rows(
    dy_ptr,  # (rows, HIDDEN), rows at dy_outer and dy_inner
    dresidual_out_ptr,  # the same with its own strides, or None
    h_ptr,  # the same with its own strides
    weight_ptr,  # (HIDDEN,) or None
    mean_ptr,  # (rows,) float32, or None for RMSNorm
    rstd_ptr,  # (rows,) float32
    dx_ptr,  # (rows, HIDDEN), contiguous, or None
    dresidual_ptr,  # (rows, HIDDEN), contiguous, or None
    dweight_ptr,  # (programs, HIDDEN) float32, contiguous, or None
    dbias_ptr,  # (programs, HIDDEN) float32, contiguous, or None
    rows,
    rows_per_program,
    inner_rows,
    dy_outer,
    dy_inner,
    dresidual_out_outer,
    dresidual_out_inner,
    h_outer,
    h_inner,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Each program takes rows_per_program whole rows, BLOCK_M at a time: every element is read once and written once."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    in_columns = column < HIDDEN
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    while first < last:
        row = first + tl.arange(0, BLOCK_M)
        in_rows = row < last
        mask = in_rows[:, None] & in_columns[None, :]
        dy_start = row_start(row, inner_rows, dy_outer, dy_inner, HIDDEN, CONTIGUOUS)[:, None]
        h_start = row_start(row, inner_rows, h_outer, h_inner, HIDDEN, CONTIGUOUS)[:, None]
        dresidual_out_start = row_start(row, inner_rows, dresidual_out_outer, dresidual_out_inner, HIDDEN, CONTIGUOUS)
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
        mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)[:, None] if SUBTRACT_MEAN else 0.0
        dy = tl.load(dy_ptr + dy_start + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x_hat = _x_hat(h_ptr, h_start + column[None, :], mean, rstd, mask, SUBTRACT_MEAN)
        if dweight_ptr is not None:
            dweight += tl.sum(dy * x_hat, axis=0)
        if dbias_ptr is not None:
            dbias += tl.sum(dy, axis=0)
        if dx_ptr is not None or dresidual_ptr is not None:
            g = dy if weight_ptr is None else dy * load_weight(weight_ptr, weight_offset, column, in_columns)[None, :]
            dh = g - x_hat * (tl.sum(x_hat * g, axis=1) / HIDDEN)[:, None]
            if SUBTRACT_MEAN:
                dh -= (tl.sum(g, axis=1) / HIDDEN)[:, None]
            stream = dresidual_out_start[:, None] + column[None, :]
            offset = row[:, None] * HIDDEN + column[None, :]
            _store_dh(dh * rstd, dresidual_out_ptr, stream, dx_ptr, dresidual_ptr, offset, mask)
        first += BLOCK_M
    _store_part(dweight_ptr, dweight, program * HIDDEN + column, in_columns)
    _store_part(dbias_ptr, dbias, program * HIDDEN + column, in_columns)


@triton.jit(do_not_specialize=["inner_rows"])
def backward_long(
    dy_ptr,
    dresidual_out_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    inner_rows,
    dy_outer,
    dy_inner,
    dresidual_out_outer,
    dresidual_out_inner,
    h_outer,
    h_inner,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Each program computes dh of one row longer than a block, in two passes. Arguments as in backward_rows."""
    row = tl.program_id(0).to(tl.int64)
    dy_start = row_start(row, inner_rows, dy_outer, dy_inner, HIDDEN, CONTIGUOUS)
    h_start = row_start(row, inner_rows, h_outer, h_inner, HIDDEN, CONTIGUOUS)
    dresidual_out_start = row_start(row, inner_rows, dresidual_out_outer, dresidual_out_inner, HIDDEN, CONTIGUOUS)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if SUBTRACT_MEAN else 0.0
    x_hat_g = tl.zeros((BLOCK_N,), tl.float32)
    g = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, HIDDEN, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = column < HIDDEN
        dy = _weighted(tl.load(dy_ptr + dy_start + column, mask=mask, other=0.0), weight_ptr, weight_offset, column, mask)
        x_hat_g += dy * _x_hat(h_ptr, h_start + column, mean, rstd, mask, SUBTRACT_MEAN)
        if SUBTRACT_MEAN:
            g += dy
    mean_x_hat_g = tl.sum(x_hat_g, axis=0) / HIDDEN
    mean_g = tl.sum(g, axis=0) / HIDDEN
    for start in range(0, HIDDEN, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = column < HIDDEN
        dy = _weighted(tl.load(dy_ptr + dy_start + column, mask=mask, other=0.0), weight_ptr, weight_offset, column, mask)
        dh = dy - _x_hat(h_ptr, h_start + column, mean, rstd, mask, SUBTRACT_MEAN) * mean_x_hat_g
        if SUBTRACT_MEAN:
            dh -= mean_g
        offset = row * HIDDEN + column
        _store_dh(dh * rstd, dresidual_out_ptr, dresidual_out_start + column, dx_ptr, dresidual_ptr, offset, mask)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "inner_rows"])
def backward_columns(
    dy_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    rows_per_program,
    inner_rows,
    dy_outer,
    dy_inner,
    h_outer,
    h_inner,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Each program sums one block of columns of dweight and dbias over its part of long rows. Arguments as in backward_rows."""
    program = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < HIDDEN
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    row = program * rows_per_program
    last = tl.minimum(row + rows_per_program, rows)
    while row < last:
        dy_start = row_start(row, inner_rows, dy_outer, dy_inner, HIDDEN, CONTIGUOUS)
        dy = tl.load(dy_ptr + dy_start + column, mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            h_start = row_start(row, inner_rows, h_outer, h_inner, HIDDEN, CONTIGUOUS)
            rstd = tl.load(rstd_ptr + row)
            mean = tl.load(mean_ptr + row) if SUBTRACT_MEAN else 0.0
            dweight += dy * _x_hat(h_ptr, h_start + column, mean, rstd, mask, SUBTRACT_MEAN)
        if dbias_ptr is not None:
            dbias += dy
        row += 1
    _store_part(dweight_ptr, dweight, program * HIDDEN + column, mask)
    _store_part(dbias_ptr, dbias, program * HIDDEN + column, mask)


@triton.jit(do_not_specialize=["programs"])
def sum_partials(partial_ptr, total_ptr, programs, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum partial, (programs, HIDDEN) float32, over its first dimension into total, (HIDDEN,) of the parameter's dtype."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < HIDDEN
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = 0
    while first < programs:
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < programs)[:, None] & in_columns[None, :]
        total += tl.load(partial_ptr + row[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)
        first += BLOCK_M
    tl.store(total_ptr + column, tl.sum(total, axis=0).to(total_ptr.dtype.element_ty), mask=in_columns)
