// SPDX-License-Identifier: Apache-2.0
// The C interface: one call, its scratch memory, the level of the processor, and rows dealt to threads.
#include <new>

#include "arguments.hpp"
#include "memory.hpp"
#include "threads.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

extern const Level LEVEL_BASELINE;
#if defined(NORMKIT_X86)
extern const Level LEVEL_AVX2, LEVEL_AVX512;
#endif

namespace {

enum Status : int { DONE = 0, NO_MEMORY = 1, NO_LEVEL = 2 };
constexpr int LEVELS = 3;

// Elements below which a second thread costs more than it saves, where rows are of 16 bits and otherwise, and elements of the
// smallest item of work.
constexpr int64_t ALONE_16 = 16384, ALONE_32 = 24576, SMALLEST_ITEM = 8192;
constexpr int64_t ITEMS_PER_THREAD = 8;
// Length from which threads share a row, when there are fewer rows than threads.
constexpr int64_t SHARED_ROW = 4 * SUM_LENGTH;
// Elements of the rows that are computed together: few enough for the first cache.
constexpr int64_t IN_BATCH = 2048;
// And in the backward pass, where dy and h are read twice: few enough for the second cache.
constexpr int64_t TOGETHER = 65536;

// Bytes of results that are written past the caches, if not in place: they would not stay there, and would be read from memory first.
#if !defined(STREAMED)
#define STREAMED (int64_t(16) << 20)
#endif

const Level *level_at(int64_t index) {
#if defined(NORMKIT_X86)
    if (index == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return &LEVEL_AVX512;
    }
    if (index == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
        return &LEVEL_AVX2;
    }
#endif
    return index == 0 ? &LEVEL_BASELINE : nullptr;
}

const Level *best(int64_t last) {
    for (int64_t index = last; index > 0; --index) {
        if (level_at(index)) {
            return level_at(index);
        }
    }
    return level_at(0);
}

// Where x and y are float32, rows wait for memory rather than for arithmetic, and are faster in AVX2's shorter vectors.
const Level *chosen(int64_t asked, bool float32) {
    static const Level *const fastest = best(LEVELS - 1), *const fastest_float32 = best(1);
    return asked >= 0 ? level_at(asked) : float32 ? fastest_float32 : fastest;
}

thread_local Memory memory;

int64_t padded(int64_t hidden) { return (hidden + BLOCK - 1) / BLOCK * BLOCK; }
int64_t ceil_divide(int64_t numerator, int64_t denominator) { return (numerator + denominator - 1) / denominator; }
int64_t at_least(int64_t least, int64_t value) { return value < least ? least : value; }

int64_t batch_of(int64_t padded) { return padded * MOST_IN_BATCH < IN_BATCH ? MOST_IN_BATCH : at_least(1, IN_BATCH / padded); }

int64_t together(int64_t padded) {
    return padded * MOST_TOGETHER < TOGETHER ? MOST_TOGETHER : at_least(1, TOGETHER / padded);
}

bool streamable(const void *array, Rows rows, int64_t dtype) {
    int64_t bits = reinterpret_cast<intptr_t>(array) | (rows.outer * size_of(dtype)) | (rows.inner * size_of(dtype));
    return !array || bits % STREAMED_AT == 0;
}

bool streams(const Forward &call) {
#if !defined(NORMKIT_X86)
    return false;  // there, vectors.hpp has no such instructions
#endif
    int64_t bytes = size_of(call.y_dtype) + (call.residual_out ? size_of(call.residual_out_dtype) : 0);
    return call.y != call.x && call.residual_out != call.residual && call.rows * call.hidden * bytes >= STREAMED &&
           streamable(call.y, call.y_rows, call.y_dtype) &&
           streamable(call.residual_out, call.residual_out_rows, call.residual_out_dtype);
}

void fill_with_ones(float *row, int64_t count) {
    for (int64_t index = 0; index < count; ++index) {
        row[index] = 1.0f;
    }
}

struct ForwardRun {
    const Forward &call;
    const Scratch &scratch;
    const Level *level;
    int64_t rows_per_item;
};

void forward_item(const void *context, int64_t item, int64_t worker) {
    auto &run = *static_cast<const ForwardRun *>(context);
    int64_t first = item * run.rows_per_item, last = first + run.rows_per_item;
    run.level->forward(run.call, run.scratch, first, last < run.call.rows ? last : run.call.rows, worker);
}

// One row that the threads share, slice by slice.
struct SharedRow {
    const Forward &call;
    const Scratch &scratch;
    const Level *level;
    int64_t threads, row;
    double *sums;
    Pass pass = Pass::ADD;
    Statistics statistics = {};

    static void item(const void *context, int64_t item, int64_t) {
        auto &own = *static_cast<const SharedRow *>(context);
        int64_t first = item * SUM_LENGTH, last = first + SUM_LENGTH;
        Slice slice{own.pass, own.row, first, last < own.call.hidden ? last : own.call.hidden, own.statistics};
        own.sums[item] = own.level->forward_slice(own.call, own.scratch, slice);
    }

    double total(Pass next) {
        pass = next;
        int64_t slices = ceil_divide(call.hidden, SUM_LENGTH);
        run_items(item, this, slices, threads, call.openmp);
        double total = 0.0;
        for (int64_t slice = 0; slice < slices; ++slice) {
            total += sums[slice];
        }
        return total;
    }

    void compute() {
        double sum = total(Pass::ADD);
        if (call.subtract_mean) {
            statistics.mean = mean_of(sum, call);
            sum = total(Pass::SQUARES);
        }
        statistics.rstd = rstd_of(sum, call);
        total(Pass::NORMALISE);
        if (statistics_of_rounded(call)) {
            statistics.mean = call.subtract_mean ? mean_of(total(Pass::ROUNDED_SUM), call) : 0.0f;
            statistics.rstd = rstd_of(total(Pass::ROUNDED_SQUARES), call);
        }
        keep(call, row, statistics);
    }
};

// Parts that the rows are dealt to in the backward pass, whatever the number of threads: each has partial sums of its own.
constexpr int64_t MOST_PARTS = 128, ROWS_PER_PART = 8, COLUMNS_PER_ITEM = 1024;

struct BackwardRun {
    const Backward &call;
    const Scratch &scratch;
    const Level *level;
    int64_t parts, rows_per_part;
};

void backward_item(const void *context, int64_t item, int64_t worker) {
    auto &run = *static_cast<const BackwardRun *>(context);
    int64_t first = item * run.rows_per_part, last = first + run.rows_per_part;
    run.level->backward(run.call, run.scratch, item, first, last < run.call.rows ? last : run.call.rows, worker);
}

void total_item(const void *context, int64_t item, int64_t) {
    auto &run = *static_cast<const BackwardRun *>(context);
    const Backward &call = run.call;
    int64_t first = item * COLUMNS_PER_ITEM, last = first + COLUMNS_PER_ITEM;
    last = last < call.hidden ? last : call.hidden;
    auto total = [&](float *partial, int64_t dtype, void *out) {
        run.level->total(partial, run.parts, run.scratch.padded, first, last, is_split(call), dtype, out);
    };
    if (call.dweight) {
        total(run.scratch.partial_dweight, call.dweight_dtype, call.dweight);
    }
    if (call.dbias) {
        total(run.scratch.partial_dbias, call.dbias_dtype, call.dbias);
    }
}

// Parameters of y's dtype are read as they are, others in float32.
void widen_parameters(const Forward &call, const Level *level, Scratch &scratch, float *memory) {
    bool as_given = !call.weight_offset && (!call.weight || call.weight_dtype == call.y_dtype) &&
                    (!call.bias || (call.weight && call.bias_dtype == call.y_dtype)) &&
                    (call.rounding != HF || call.x_dtype == call.y_dtype || call.x_dtype == FLOAT32 || call.y_dtype == FLOAT32);
    if (as_given || !(call.weight || call.bias)) {
        return;
    }
    scratch.weight = memory;
    if (call.weight) {
        level->widen(call.weight, call.weight_dtype, is_split(call), call.hidden, call.weight_offset, scratch.weight);
    } else {
        fill_with_ones(scratch.weight, scratch.padded);
    }
    if (call.bias) {
        scratch.bias = memory + scratch.padded;
        level->widen(call.bias, call.bias_dtype, is_split(call), call.hidden, 0.0, scratch.bias);
    }
}

}  // namespace

// Of the sources that this was compiled from.
EXPORTED const char *normkit_digest() { return DIGEST; }

// The levels that this processor has, as bits.
EXPORTED int64_t normkit_levels() {
    int64_t bits = 0;
    for (int64_t index = 0; index < LEVELS; ++index) {
        bits |= level_at(index) ? int64_t(1) << index : 0;
    }
    return bits;
}

EXPORTED int normkit_forward(const Forward *arguments) {
    const Forward &call = *arguments;
    const Level *level = chosen(call.level, call.x_dtype == FLOAT32 && call.y_dtype == FLOAT32);
    if (!level) {
        return NO_LEVEL;
    }
    if (!call.rows) {
        return DONE;
    }
    Memory::Use use(memory);
    int64_t alone = call.x_dtype != FLOAT32 ? ALONE_16 : ALONE_32;
    int64_t threads = call.rows * call.hidden < alone ? 1 : at_least(1, call.threads);
    bool shared = threads > call.rows && call.hidden >= SHARED_ROW;
    int64_t workers = shared ? 1 : threads < call.rows ? threads : call.rows;
    Scratch scratch{};
    scratch.padded = padded(call.hidden);
    scratch.batch = shared ? 1 : batch_of(scratch.padded);
    scratch.streams = !shared && streams(call);
    scratch.rows_per_worker = scratch.batch + 2;
    int64_t floats = (workers * scratch.rows_per_worker + 2) * scratch.padded;
    scratch.rows = memory.floats(floats + 2 * ceil_divide(call.hidden, SUM_LENGTH));
    if (!scratch.rows) {
        return NO_MEMORY;
    }
    widen_parameters(call, level, scratch, scratch.row(workers, 0));
    if (shared) {
        for (int64_t row = 0; row < call.rows; ++row) {
            SharedRow{call, scratch, level, threads, row, reinterpret_cast<double *>(scratch.rows + floats)}.compute();
        }
        return DONE;
    }
    int64_t rows_per_item = at_least(ceil_divide(SMALLEST_ITEM, call.hidden), call.rows / (workers * ITEMS_PER_THREAD));
    ForwardRun run{call, scratch, level, rows_per_item};
    run_items(forward_item, &run, ceil_divide(call.rows, rows_per_item), workers, call.openmp);
    return DONE;
}

EXPORTED int normkit_backward(const Backward *arguments) {
    const Backward &call = *arguments;
    const Level *level = chosen(call.level, false);
    if (!level) {
        return NO_LEVEL;
    }
    int64_t rows_per_part = at_least(ROWS_PER_PART, ceil_divide(call.rows, MOST_PARTS));
    Memory::Use use(memory);
    // one part without rows makes the sums zero
    int64_t parts = at_least(1, ceil_divide(call.rows, rows_per_part));
    int64_t threads = call.rows * call.hidden < ALONE_16 ? 1 : at_least(1, call.threads < parts ? call.threads : parts);
    int64_t sums = (call.dweight ? parts : 0) + (call.dbias ? parts : 0);
    Scratch scratch{};
    scratch.padded = padded(call.hidden);
    scratch.batch = together(scratch.padded);
    scratch.rows_per_worker = 3 * scratch.batch;
    scratch.rows = memory.floats((threads * scratch.rows_per_worker + 1 + sums) * scratch.padded);
    if (!scratch.rows) {
        return NO_MEMORY;
    }
    scratch.weight = scratch.row(threads, 0);
    if (call.weight) {
        level->widen(call.weight, call.weight_dtype, is_split(call), call.hidden, call.weight_offset, scratch.weight);
    } else {
        fill_with_ones(scratch.weight, scratch.padded);
    }
    scratch.partial_dweight = scratch.weight + scratch.padded;
    scratch.partial_dbias = scratch.partial_dweight + (call.dweight ? parts : 0) * scratch.padded;
    BackwardRun run{call, scratch, level, parts, rows_per_part};
    run_items(backward_item, &run, parts, threads, call.openmp);
    if (sums) {
        run_items(total_item, &run, ceil_divide(call.hidden, COLUMNS_PER_ITEM), threads, call.openmp);
    }
    return DONE;
}
