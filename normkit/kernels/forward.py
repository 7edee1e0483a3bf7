# SPDX-License-Identifier: Apache-2.0
"""Forward: h = x + residual; y = (h - mean) rstd (weight_offset + weight) + bias, for whole rows and for long ones."""

import triton
import triton.language as tl

from .rows import load_h, rounded, row_start, statistics, store_rows, weighted


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
    AGAIN: tl.constexpr,
):
    """Each program normalises BLOCK_M whole rows, held in registers: every element is read once and written once.

    With AGAIN the statistics for a backward pass come first, and the rows are read again for y: registers do not hold both.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)[None, :]
    # a program of one row has that row: to say so saves instructions, and registers at 8192 float32
    in_rows = (row < rows) | (BLOCK_M == 1)
    mask = in_rows[:, None] & (column < HIDDEN)
    x_start = row_start(row, inner_rows, x_outer, x_inner, HIDDEN, CONTIGUOUS)[:, None]
    residual_start = row_start(row, inner_rows, residual_outer, residual_inner, HIDDEN, CONTIGUOUS)[:, None]
    y_start = x_start if IN_PLACE else row[:, None] * HIDDEN
    residual_out_start = residual_start if IN_PLACE else row[:, None] * HIDDEN

    if rstd_ptr is not None and AGAIN:
        # by other addresses and with another hint, or the compiler would hold what it has loaded already
        again = load_h(x_ptr, residual_ptr, x_start + column, residual_start + column, mask, "evict_last")
        _keep_statistics(rounded(again, residual_out_ptr), mean_ptr, rstd_ptr, row, in_rows, mask, eps, HIDDEN, SUBTRACT_MEAN)
    residual_row = None if residual_ptr is None else residual_ptr + residual_start
    h = load_h(x_ptr + x_start, residual_row, column, column, mask, "evict_first")
    kept = rounded(h, residual_out_ptr)
    store_rows(None if residual_out_ptr is None else residual_out_ptr + residual_out_start, kept, column, mask, "")
    if rstd_ptr is not None and not AGAIN:
        # first, as then less is held at once
        _keep_statistics(kept, mean_ptr, rstd_ptr, row, in_rows, mask, eps, HIDDEN, SUBTRACT_MEAN)
    if ROUNDING != "sum":
        h = kept
    h, _, rstd = statistics(h, mask, eps, HIDDEN, SUBTRACT_MEAN)
    y = weighted(h * rstd[:, None], x_ptr, weight_ptr, bias_ptr, weight_offset, column, column < HIDDEN, ROUNDING)
    store_rows(y_ptr + y_start, y, column, mask, "")


@triton.jit
def _keep_statistics(kept, mean_ptr, rstd_ptr, row, in_rows, mask, eps, HIDDEN: tl.constexpr, SUBTRACT_MEAN: tl.constexpr):
    """Store the statistics of h as residual_out holds it: the backward pass has that, and needs those of just that."""
    _, mean, rstd = statistics(kept, mask, eps, HIDDEN, SUBTRACT_MEAN)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=in_rows)


@triton.jit(do_not_specialize=["inner_rows"])
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
    READ_BACK: tl.constexpr,
    TWO_STATISTICS: tl.constexpr,
):
    """Each program normalises one row longer than it can hold, in two passes: statistics, then y. Arguments as in forward_rows.

    The second pass goes from the row's end to its start, so that it finds in a cache what the first one read last. It reads x
    and residual, before it writes there; with READ_BACK the first pass stores residual_out, and the second reads that alone.
    TWO_STATISTICS says that a backward pass follows, which needs those of the rounded h, and y those of h.
    """
    row = tl.program_id(0).to(tl.int64)
    x_start = row_start(row, inner_rows, x_outer, x_inner, HIDDEN, CONTIGUOUS)
    residual_start = row_start(row, inner_rows, residual_outer, residual_inner, HIDDEN, CONTIGUOUS)
    y_start = x_start if IN_PLACE else row * HIDDEN
    residual_out_start = residual_start if IN_PLACE else row * HIDDEN
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    # the compiler does not know that this is 0: it would unroll loops of few blocks, and keep more than registers hold
    zero = tl.minimum(inner_rows, 0)
    pointers, starts = (x_ptr, residual_ptr, residual_out_ptr), (x_start, residual_start, residual_out_start)
    mean, rstd, kept_mean, kept_rstd = _long_statistics(
        pointers, starts, zero, eps, HIDDEN, BLOCK_N, SUBTRACT_MEAN, ROUNDING, READ_BACK, TWO_STATISTICS
    )
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, kept_rstd)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, kept_mean)
    if READ_BACK:
        tl.debug_barrier()
    block = zero + BLOCKS
    while block > 0:
        block -= 1
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = column < HIDDEN
        if READ_BACK:
            h = load_h(residual_out_ptr, None, residual_out_start + column, 0, mask, "evict_first")
        else:
            h = load_h(x_ptr, residual_ptr, x_start + column, residual_start + column, mask, "evict_first")
            kept = rounded(h, residual_out_ptr)
            store_rows(residual_out_ptr, kept, residual_out_start + column, mask, "evict_first")
            if ROUNDING != "sum":
                h = kept
        y = weighted((h - mean) * rstd, x_ptr, weight_ptr, bias_ptr, weight_offset, column, mask, ROUNDING)
        store_rows(y_ptr, y, y_start + column, mask, "evict_first")


@triton.jit
def _long_statistics(
    pointers,  # x, residual, residual_out
    starts,  # of the row in each
    zero,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ROUNDING: tl.constexpr,
    READ_BACK: tl.constexpr,
    TWO_STATISTICS: tl.constexpr,
):
    """Return mean and rstd of a row: those for y, and those for a backward pass."""
    x_ptr, residual_ptr, residual_out_ptr = pointers
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    KEEP: tl.constexpr = "evict_first" if READ_BACK else "evict_last"
    lanes = tl.zeros((BLOCK_N,), tl.float32)
    mean, squares, kept_means, kept_squares = lanes, lanes, lanes, lanes
    block = zero
    while block < BLOCKS:
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = column < HIDDEN
        h = load_h(x_ptr, residual_ptr, starts[0] + column, starts[1] + column, mask, KEEP)
        kept = rounded(h, residual_out_ptr)
        if READ_BACK:
            store_rows(residual_out_ptr, kept, starts[2] + column, mask, "evict_last")
        block += 1
        share = 1.0 / block
        mean, squares = _observe(mean, squares, h if ROUNDING == "sum" else kept, mask, share, SUBTRACT_MEAN)
        if TWO_STATISTICS:
            kept_means, kept_squares = _observe(kept_means, kept_squares, kept, mask, share, SUBTRACT_MEAN)
    mean, rstd = _merge(mean, squares, eps, HIDDEN, BLOCK_N, SUBTRACT_MEAN)
    kept_mean, kept_rstd = mean, rstd
    if TWO_STATISTICS:
        kept_mean, kept_rstd = _merge(kept_means, kept_squares, eps, HIDDEN, BLOCK_N, SUBTRACT_MEAN)
    return mean, rstd, kept_mean, kept_rstd


@triton.jit
def _observe(mean, squares, h, mask, share, SUBTRACT_MEAN: tl.constexpr):
    """Take the next value of each lane into the lane's mean and sum of squared deviations, as in Welford (1962).

    As accurate as a second pass over the row would be, and no lane waits for another before the row's end.
    """
    if SUBTRACT_MEAN:
        delta = tl.where(mask, h - mean, 0.0)
        mean += delta * share
        return mean, squares + delta * (h - mean)
    return mean, squares + h * h


@triton.jit
def _merge(mean, squares, eps, HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, SUBTRACT_MEAN: tl.constexpr):
    """Return mean and rstd of a row from those of its lanes, as in Chan, Golub and LeVeque (1979)."""
    of_row = 0.0
    if SUBTRACT_MEAN:
        values = ((HIDDEN - tl.arange(0, BLOCK_N) + BLOCK_N - 1) // BLOCK_N).to(tl.float32)
        of_row = tl.sum(mean * values, axis=0) / HIDDEN
        squares += values * (mean - of_row) * (mean - of_row)
    return of_row, tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)
