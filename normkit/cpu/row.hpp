// SPDX-License-Identifier: Apache-2.0
// Where a row is, and a row in float32.
#pragma once
#include "forward.hpp"

namespace {

// An array from an element on; null stays null.
template <class Pointer>
ALWAYS Pointer from(Pointer array, int64_t element, int64_t dtype) {
    return array ? (Pointer)((char *)array + element * size_of(dtype)) : nullptr;
}

template <class Pointer>
ALWAYS Pointer row_of(Pointer array, Rows rows, int64_t row, int64_t inner_rows, int64_t dtype) {
    int64_t start = inner_rows == 1 ? row * rows.outer : row / inner_rows * rows.outer + row % inner_rows * rows.inner;
    return from(array, start, dtype);
}

// A row in float32, exactly: itself, or written to `wide`.
const void *widened(const void *row, int64_t dtype, int64_t length, float *wide) {
    if (!row || dtype == FLOAT32) {
        return row;
    }
    widen(row, dtype, false, length, 0.0, wide);
    return wide;
}

}  // namespace
