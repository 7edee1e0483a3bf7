// SPDX-License-Identifier: Apache-2.0
// The arguments of one call, as normkit/cpu/library.py packs them: fields of eight bytes, strides in elements.
#pragma once
#include <cstdint>

// Row r of an array starts at element (r / inner_rows) * outer + (r % inner_rows) * inner.
struct Rows {
    int64_t outer, inner;
};

// GNU OpenMP's GOMP_parallel and omp_get_thread_num, or what does the same with the threads of the caller's framework, or null.
struct OpenMP {
    void *parallel, *thread_number;
};

// Null pointers for arrays that there are not.
struct Forward {
    const void *x, *residual, *weight, *bias;
    void *y, *residual_out;
    float *mean, *rstd;
    int64_t threads;
    Rows x_rows, residual_rows, y_rows, residual_out_rows;
    int64_t rows, inner_rows, hidden;
    double eps, weight_offset;
    int64_t x_dtype, residual_dtype, weight_dtype, bias_dtype, y_dtype, residual_out_dtype;
    int64_t subtract_mean, rounding, level;
    OpenMP openmp;
};

// The statistics are of h as it is given; dx and dresidual, of shape (rows, hidden), are contiguous.
struct Backward {
    const void *dy, *dresidual_out, *h, *weight;
    const float *mean, *rstd;
    void *dx, *dresidual, *dweight, *dbias;
    int64_t threads;
    Rows dy_rows, dresidual_out_rows, h_rows;
    int64_t rows, inner_rows, hidden;
    double weight_offset;
    int64_t dy_dtype, h_dtype, weight_dtype, dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype;
    int64_t level;
    OpenMP openmp;
};

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Rounding : int64_t { SUM = 0, STORED = 1, HF = 2 };

static inline int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Whether all rows of a call are bfloat16, for which vectors.hpp has an order of its own.
static inline bool is_split(const Forward &call) {
    return call.x_dtype == BFLOAT16 && call.y_dtype == BFLOAT16 && (!call.residual || call.residual_dtype == BFLOAT16) &&
           (!call.residual_out || call.residual_out_dtype == BFLOAT16);
}

static inline bool is_split(const Backward &call) {
    return call.dy_dtype == BFLOAT16 && call.h_dtype == BFLOAT16 && (!call.dx || call.dx_dtype == BFLOAT16) && !call.dresidual;
}

// What a call needs besides, from the thread that calls: memory for every worker, and parameters in float32.
struct Scratch {
    float *rows;              // rows_per_worker for each worker
    int64_t rows_per_worker;  // a batch and two more; backward, three batches
    int64_t batch;            // rows that are computed together
    bool streams;             // whether results are written past the caches
    int64_t padded;           // hidden up to a whole number of blocks: the stride of all these rows
    float *weight, *bias;
    float *partial_dweight, *partial_dbias;

    float *row(int64_t worker, int64_t index) const { return rows + (worker * rows_per_worker + index) * padded; }
};

struct Statistics {
    float mean, rstd;
};

// One pass over some elements of a row that threads share.
enum class Pass { ADD, SQUARES, NORMALISE, ROUNDED_SUM, ROUNDED_SQUARES };
struct Slice {
    Pass pass;
    int64_t row, first, last;
    Statistics statistics;
};

// The rows of one kind of processor; every level computes the same bits.
struct Level {
    // Write offset + values as float32, in the order of split rows if asked.
    void (*widen)(const void *values, int64_t dtype, bool split, int64_t count, double offset, float *out);
    void (*forward)(const Forward &, const Scratch &, int64_t first, int64_t last, int64_t worker);
    // The sum that the pass makes.
    double (*forward_slice)(const Forward &, const Scratch &, const Slice &);
    // One part of the rows: dx, dresidual, and its own row of the partial sums.
    void (*backward)(const Backward &, const Scratch &, int64_t part, int64_t first, int64_t last, int64_t worker);
    // The partial sums of the columns from first to last, as dtype; the first part's are lost.
    void (*total)(float *partial, int64_t parts, int64_t padded, int64_t first, int64_t last, bool split, int64_t dtype, void *out);
};

// Bytes to which results that are written past the caches are aligned.
constexpr int64_t STREAMED_AT = 16;

constexpr int64_t MOST_IN_BATCH = 16;

// Rows of the backward pass that are computed together: more are slower, because the same places of as many rows, which are
// often a power of two apart, compete for the same lines of the first cache.
constexpr int64_t MOST_TOGETHER = 4;

// Elements of a row that are handled at once; sums have so many terms side by side, on every processor.
constexpr int64_t BLOCK = 32;

// Longer sums are made of parts of this length, which are added up in float64: so a row can be dealt to threads.
constexpr int64_t SUM_LENGTH = 8192;

static inline float mean_of(double sum, const Forward &call) { return float(sum * (1.0 / double(call.hidden))); }

static inline float rstd_of(double sum_of_squares, const Forward &call) {
    return 1.0f / __builtin_sqrtf(float(sum_of_squares * (1.0 / double(call.hidden))) + float(call.eps));
}

// The backward pass has the rounded h, and needs the statistics of just that.
static inline bool statistics_of_rounded(const Forward &call) {
    return call.rstd && call.residual_out && call.residual_out_dtype != FLOAT32 && call.rounding == SUM;
}

static inline void keep(const Forward &call, int64_t row, Statistics statistics) {
    if (call.mean) {
        call.mean[row] = statistics.mean;
    }
    if (call.rstd) {
        call.rstd[row] = statistics.rstd;
    }
}
