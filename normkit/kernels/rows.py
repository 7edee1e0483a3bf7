# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: where a row starts, its statistics, and the weight.

Every value is converted to float32 as soon as it is loaded: arithmetic in bfloat16 loses accuracy on all hardware.
"""

import triton
import triton.language as tl


@triton.jit
def row_start(row, inner_rows, outer, inner, HIDDEN: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Return the offset of the first element of each row, in elements; row is int64, so large arrays do not overflow."""
    if CONTIGUOUS:
        # from a constant the compiler sees the alignment of every row, also where HIDDEN is no multiple of 16
        return row * HIDDEN
    return (row // inner_rows) * outer + (row % inner_rows) * inner


@triton.jit
def load_h(x_ptr, residual_ptr, x_offset, residual_offset, mask, KEEP: tl.constexpr):
    """Return x + residual in float32. KEEP says to the caches how soon they are needed again."""
    h = tl.load(x_ptr + x_offset, mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + residual_offset, mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)
    return h


@triton.jit
def store_rows(ptr, values, offset, mask, KEEP: tl.constexpr):
    """Store values in the array's dtype, where there is an array."""
    if ptr is not None:
        tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=mask, eviction_policy=KEEP)


@triton.jit
def rounded(h, residual_out_ptr):
    """Return h as residual_out will hold it, in float32; h itself where there is none."""
    if residual_out_ptr is not None:
        h = h.to(residual_out_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def statistics(h, mask, eps, HIDDEN: tl.constexpr, SUBTRACT_MEAN: tl.constexpr):
    """Return the centred rows of h, (rows, columns), with the mean and rstd of each; the mean is 0 for RMSNorm."""
    mean = tl.zeros((h.shape[0],), tl.float32)
    if SUBTRACT_MEAN:
        mean = tl.sum(h, axis=1) / HIDDEN
        h = tl.where(mask, h - mean[:, None], 0.0)
    return h, mean, tl.rsqrt(tl.sum(h * h, axis=1) / HIDDEN + eps)


@triton.jit
def weighted(x_hat, x_ptr, weight_ptr, bias_ptr, weight_offset, column, mask, ROUNDING: tl.constexpr):
    """Return x_hat (weight_offset + weight) + bias in float32."""
    if ROUNDING == "hf":
        x_hat = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        x_hat = x_hat * (weight_offset + tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32))
    if bias_ptr is not None:
        x_hat = x_hat + tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return x_hat
