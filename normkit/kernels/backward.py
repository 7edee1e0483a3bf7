# SPDX-License-Identifier: Apache-2.0
"""Backward, of rows that one program holds: with x_hat = (h - mean) rstd and g = dy (weight_offset + weight),

    dh = rstd (g - x_hat mean(x_hat g) - mean(g)) + dresidual_out      (mean(g) for LayerNorm only)
    dweight = sum over rows of dy x_hat,   dbias = sum over rows of dy

dx and dresidual are dh. The rows are dealt to programs in fixed, equal parts; each part's sums go to its own row of a float32
array, and `sum_partials` adds these up in a fixed order: dweight and dbias are the same bits in every run.
"""

import triton
import triton.language as tl

from .rows import row_start, store_rows


@triton.jit
def look(
    pointers,  # dy; h, or None; weight, or None
    offsets,  # of the elements of dy, and of h
    column,
    mask,
    mean,
    rstd,
    weight_offset,
    SUBTRACT_MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT_SECOND: tl.constexpr = False,
):
    """Return dy, x_hat (0 without h) and g. KEEP says to the caches how soon the rows are needed again.

    The compiler merges loads only if they are equal, so that a second look with another KEEP is one.

    Where masked, dy is 0, so x_hat need not be. The weight has the rows' mask, or it would be held in registers in all rows.
    The order of the loads decides when registers are free: backward_rows spills nothing with WEIGHT_SECOND, others without.
    """
    dy_ptr, h_ptr, weight_ptr = pointers
    dy = tl.load(dy_ptr + offsets[0], mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if WEIGHT_SECOND and weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    x_hat = 0.0
    if h_ptr is not None:
        x_hat = tl.load(h_ptr + offsets[1], mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)
        if SUBTRACT_MEAN:
            x_hat -= mean
        x_hat *= rstd
    g = dy
    if weight_ptr is not None:
        if not WEIGHT_SECOND:
            weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
        g = dy * (weight_offset + weight.to(tl.float32))
    return dy, x_hat, g


@triton.jit
def look_at_rows(
    pointers,  # dy; h, or None; weight, or None
    statistics,  # mean, or None; rstd
    strides,  # outer and inner of dy, then of h
    row,
    in_rows,
    column,
    inner_rows,
    weight_offset,
    HIDDEN: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    WEIGHT_SECOND: tl.constexpr = False,
):
    """Look at columns (1, BLOCK_N) of rows (BLOCK_M,). Return dy, x_hat and g with the rows' mask and rstd."""
    mean_ptr, rstd_ptr = statistics
    mask = in_rows[:, None] & (column < HIDDEN)
    dy_offset = row_start(row, inner_rows, strides[0], strides[1], HIDDEN, CONTIGUOUS)[:, None] + column
    h_offset = row_start(row, inner_rows, strides[2], strides[3], HIDDEN, CONTIGUOUS)[:, None] + column
    rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
    mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)[:, None] if SUBTRACT_MEAN else 0.0
    offsets = (dy_offset, h_offset)
    dy, x_hat, g = look(pointers, offsets, column, mask, mean, rstd, weight_offset, SUBTRACT_MEAN, "", WEIGHT_SECOND)
    return dy, x_hat, g, mask, rstd


@triton.jit
def load_or_zero(ptr, offset, mask):
    """Return what is there, and will not be needed again; 0 where there is no array."""
    if ptr is not None:  # both sides of an expression would be compiled
        values = tl.load(ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        values = tl.zeros((1,), tl.float32)
    return values


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
    column = tl.arange(0, BLOCK_N)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pointers, stats = (dy_ptr, h_ptr, weight_ptr), (mean_ptr, rstd_ptr)
    strides = (dy_outer, dy_inner, h_outer, h_inner)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    while first < last:
        row = first + tl.arange(0, BLOCK_M)
        in_rows = row < last
        dy, x_hat, g, mask, rstd = look_at_rows(
            pointers, stats, strides, row, in_rows, column, inner_rows, weight_offset, HIDDEN, SUBTRACT_MEAN, CONTIGUOUS, True
        )
        stream = row_start(row, inner_rows, dresidual_out_outer, dresidual_out_inner, HIDDEN, CONTIGUOUS)[:, None] + column
        # asked for before it is needed, so that all of a row is on its way at once
        dresidual_out = load_or_zero(dresidual_out_ptr, stream, mask)
        if dweight_ptr is not None:
            dweight += dy * x_hat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None or dresidual_ptr is not None:
            dh = g - x_hat * (tl.sum(x_hat * g, axis=1) / HIDDEN)[:, None]
            if SUBTRACT_MEAN:
                dh -= (tl.sum(g, axis=1) / HIDDEN)[:, None]
            dh = dh * rstd + dresidual_out.to(tl.float32)
            store_rows(dx_ptr, dh, row[:, None] * HIDDEN + column, mask, "")
            store_rows(dresidual_ptr, dh, row[:, None] * HIDDEN + column, mask, "")
        first += BLOCK_M
    columns = tl.arange(0, BLOCK_N)
    store_rows(dweight_ptr, tl.sum(dweight, axis=0), program * HIDDEN + columns, columns < HIDDEN, "")
    store_rows(dbias_ptr, tl.sum(dbias, axis=0), program * HIDDEN + columns, columns < HIDDEN, "")


@triton.jit(do_not_specialize=["rows", "rows_per_program", "inner_rows"])
def backward_twice(
    dy_ptr,
    dresidual_out_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
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
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Each program takes rows_per_program rows, one at a time. Arguments as in backward_rows.

    Registers hold the sums of dweight and dbias, and nothing of a row: dy and h are read a second time, which finds them in
    the L1 cache. PIECES blocks make up a row, so that only one of them at a time is being computed with.
    """
    program = tl.program_id(0).to(tl.int64)
    dweight, dbias = (), ()
    for piece in tl.static_range(PIECES):  # noqa: B007
        dweight, dbias = dweight + (tl.zeros((BLOCK_N,), tl.float32),), dbias + (tl.zeros((BLOCK_N,), tl.float32),)  # noqa: RUF005
    row = program * rows_per_program
    last = tl.minimum(row + rows_per_program, rows)
    while row < last:
        dy_row = dy_ptr + row_start(row, inner_rows, dy_outer, dy_inner, HIDDEN, CONTIGUOUS)
        h_row = h_ptr + row_start(row, inner_rows, h_outer, h_inner, HIDDEN, CONTIGUOUS)
        pointers = (dy_row, h_row, weight_ptr)
        stream_start = row_start(row, inner_rows, dresidual_out_outer, dresidual_out_inner, HIDDEN, CONTIGUOUS)
        stream = None if dresidual_out_ptr is None else dresidual_out_ptr + stream_start
        dx_row = None if dx_ptr is None else dx_ptr + row * HIDDEN
        results = (dx_row, None if dresidual_ptr is None else dresidual_ptr + row * HIDDEN)
        rstd = tl.load(rstd_ptr + row)
        mean = tl.load(mean_ptr + row) if SUBTRACT_MEAN else 0.0
        sums, zero = (0.0, 0.0), tl.minimum(rows, 0)
        if dx_ptr is not None or dresidual_ptr is not None:
            sums = _first_look(pointers, zero, mean, rstd, weight_offset, HIDDEN, BLOCK_N, PIECES, SUBTRACT_MEAN)
        dweight, dbias = _second_look(
            pointers, stream, results, dweight, dbias, sums, mean, rstd, weight_offset, HIDDEN, BLOCK_N, PIECES, SUBTRACT_MEAN
        )
        row += 1
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK_N + tl.arange(0, BLOCK_N)
        store_rows(dweight_ptr, dweight[piece], program * HIDDEN + column, column < HIDDEN, "")
        store_rows(dbias_ptr, dbias[piece], program * HIDDEN + column, column < HIDDEN, "")


@triton.jit
def _first_look(
    pointers,
    zero,
    mean,
    rstd,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
):
    """Return the sums of x_hat g and of g over a row, in shares yet to be added up."""
    # a thread has so many neighbours at least, which it adds up itself: fewer registers hold the sums
    EACH: tl.constexpr = 4
    sum_x_hat_g, sum_g = tl.zeros((BLOCK_N // EACH,), tl.float32), tl.zeros((BLOCK_N // EACH,), tl.float32)
    # two pieces at a time: the compiler asks for all of them at once, and registers do not hold more besides dweight and dbias
    first = zero
    while first < PIECES:
        tl.assume((first >= 0) & (first <= PIECES - 2))
        for piece in tl.static_range(2):
            column = (first + piece) * BLOCK_N + tl.arange(0, BLOCK_N)
            _, x_hat, g = look(
                pointers, (column, column), column, column < HIDDEN, mean, rstd, weight_offset, SUBTRACT_MEAN, "evict_last"
            )
            sum_x_hat_g += tl.sum(tl.reshape(x_hat * g, (BLOCK_N // EACH, EACH)), axis=1)
            sum_g += tl.sum(tl.reshape(g, (BLOCK_N // EACH, EACH)), axis=1)
        first += 2
    return sum_x_hat_g, sum_g


@triton.jit
def _second_look(
    pointers,
    stream,  # dresidual_out, or None
    results,  # dx and dresidual, each or None
    dweight,
    dbias,
    sums,
    mean,
    rstd,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
):
    """Store dh of a row, and return dweight and dbias with what the row adds to them."""
    DH: tl.constexpr = results[0] is not None or results[1] is not None
    mean_x_hat_g, mean_g, dresidual_out = 0.0, 0.0, 0.0
    if DH:
        # asked for before it is needed, and so is every next piece
        dresidual_out = load_or_zero(stream, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N) < HIDDEN)
        mean_x_hat_g = tl.sum(sums[0], axis=0) / HIDDEN
        mean_g = tl.sum(sums[1], axis=0) / HIDDEN if SUBTRACT_MEAN else 0.0
    more_dweight, more_dbias = (), ()
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = column < HIDDEN
        dy, x_hat, g = look(pointers, (column, column), column, mask, mean, rstd, weight_offset, SUBTRACT_MEAN, "evict_first")
        more_dweight, more_dbias = more_dweight + (dweight[piece] + dy * x_hat,), more_dbias + (dbias[piece] + dy,)  # noqa: RUF005
        if DH:
            dh = (g - x_hat * mean_x_hat_g - mean_g) * rstd + dresidual_out.to(tl.float32)
            if piece + 1 < PIECES:
                dresidual_out = load_or_zero(stream, column + BLOCK_N, column + BLOCK_N < HIDDEN)
            store_rows(results[0], dh, column, mask, "")
            store_rows(results[1], dh, column, mask, "")
    return more_dweight, more_dbias


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
