# SPDX-License-Identifier: Apache-2.0
"""Forward: h = x + residual; y = (h - mean) rstd (weight_offset + weight) + bias, for whole rows and for long ones."""

import triton
import triton.language as tl

from .rows import load_h, rounded, row_start, statistics, weighted


@triton.jit(do_not_specialize=["rows", "inner_rows"])
def forward_rows(
    x_ptr,  # (rows, HIDDEN), rows at x_outer and x_inner
    residual_ptr,  # the same with its own strides, or None
    weight_ptr,  # (HIDDEN,) or None
    bias_ptr,  # (HIDDEN,) or None
    y_ptr,  # (rows, HIDDEN), contiguous, or x_ptr if IN_PLACE
    residual_out_ptr,  # (rows, HIDDEN), contiguous, or residual_ptr if IN_PLACE, or None
    mean_ptr,  # (rows,) float32, or None
    rstd_ptr,  # (rows,) float32, or None
    rows,
    inner_rows,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    eps,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ROUNDING: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Each program normalises BLOCK_M whole rows, held in registers: every element is read once and written once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)[None, :]
    in_rows = row < rows
    mask = in_rows[:, None] & (column < HIDDEN)
    x_start = row_start(row, inner_rows, x_outer, x_inner, HIDDEN, CONTIGUOUS)[:, None]
    residual_start = row_start(row, inner_rows, residual_outer, residual_inner, HIDDEN, CONTIGUOUS)[:, None]
    y_start = x_start if IN_PLACE else row[:, None] * HIDDEN
    residual_out_start = residual_start if IN_PLACE else row[:, None] * HIDDEN

    h = load_h(x_ptr, residual_ptr, x_start + column, residual_start + column, mask)
    kept = rounded(h, residual_out_ptr)
    if residual_out_ptr is not None:
        stored = kept.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + residual_out_start + column, stored, mask=mask)
    if ROUNDING != "sum":
        h = kept
    h, mean, rstd = statistics(h, mask, eps, HIDDEN, SUBTRACT_MEAN)
    y = weighted(h * rstd[:, None], x_ptr, weight_ptr, bias_ptr, weight_offset, column, column < HIDDEN, ROUNDING)
    tl.store(y_ptr + y_start + column, y.to(y_ptr.dtype.element_ty), mask=mask)
    if rstd_ptr is not None:
        if ROUNDING == "sum" and residual_out_ptr is not None:
            # the backward pass has the rounded h, and needs the statistics of just that
            _, mean, rstd = statistics(kept, mask, eps, HIDDEN, SUBTRACT_MEAN)
        tl.store(rstd_ptr + row, rstd, mask=in_rows)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=in_rows)


@triton.jit(do_not_specialize=["rows", "inner_rows"])
def forward_long(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    residual_out_ptr,
    mean_ptr,
    rstd_ptr,
    inner_rows,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    eps,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ROUNDING: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Each program normalises one row longer than a block, in two passes: statistics, then y. Arguments as in forward_rows.

    With a backward to follow, and h not rounded, a third pass finds the statistics of the rounded h.

    The second pass finds the row in the L2 cache. Nothing is written before the last read of it, so in place is safe.
    """
    row = tl.program_id(0).to(tl.int64)
    x_start = row_start(row, inner_rows, x_outer, x_inner, HIDDEN, CONTIGUOUS)
    residual_start = row_start(row, inner_rows, residual_outer, residual_inner, HIDDEN, CONTIGUOUS)
    y_start = x_start if IN_PLACE else row * HIDDEN
    residual_out_start = residual_start if IN_PLACE else row * HIDDEN

    row_ptr = x_ptr + x_start
    stream_ptr = residual_ptr if residual_ptr is None else residual_ptr + residual_start
    mean, rstd = _long_statistics(row_ptr, stream_ptr, residual_out_ptr, eps, HIDDEN, BLOCK_N, SUBTRACT_MEAN, ROUNDING != "sum")
    if rstd_ptr is not None:
        kept_mean, kept_rstd = mean, rstd
        if ROUNDING == "sum" and residual_out_ptr is not None:
            # the backward pass has the rounded h, and needs the statistics of just that
            kept_mean, kept_rstd = _long_statistics(
                row_ptr, stream_ptr, residual_out_ptr, eps, HIDDEN, BLOCK_N, SUBTRACT_MEAN, True
            )
        tl.store(rstd_ptr + row, kept_rstd)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, kept_mean)
    for start in range(0, HIDDEN, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = column < HIDDEN
        h = load_h(x_ptr, residual_ptr, x_start + column, residual_start + column, mask)
        kept = rounded(h, residual_out_ptr)
        if residual_out_ptr is not None:
            stored = kept.to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + residual_out_start + column, stored, mask=mask)
        x_hat = ((h if ROUNDING == "sum" else kept) - mean) * rstd
        y = weighted(x_hat, x_ptr, weight_ptr, bias_ptr, weight_offset, column, mask, ROUNDING)
        tl.store(y_ptr + y_start + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _long_statistics(
    x_ptr,
    residual_ptr,
    residual_out_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Return mean and rstd of one row, of h or of h rounded as residual_out is; each element is read once.

    The blocks' means and sums of squares are merged as in Chan, Golub and LeVeque (1979), which is as accurate as a second
    pass over the row would be.
    """
    mean = 0.0
    squares = 0.0
    for start in range(0, HIDDEN, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = column < HIDDEN
        h = load_h(x_ptr, residual_ptr, column, column, mask)
        if ROUNDED:
            h = rounded(h, residual_out_ptr)
        if SUBTRACT_MEAN:
            count = tl.minimum(HIDDEN - start, BLOCK_N).to(tl.float32)
            block_mean = tl.sum(h, axis=0) / count
            h = tl.where(mask, h - block_mean, 0.0)
            share = count / (start + count)
            delta = block_mean - mean
            mean += delta * share
            squares += delta * delta * start * share
        squares += tl.sum(h * h, axis=0)
    return mean, tl.rsqrt(squares / HIDDEN + eps)
