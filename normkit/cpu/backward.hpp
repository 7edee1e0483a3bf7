// SPDX-License-Identifier: Apache-2.0
// The backward pass of some rows in two passes over them: two sums of each row; then dx, dresidual, dweight and dbias.
#pragma once
#include "row.hpp"

namespace {

// The constants of a row: dh = (g - x_hat of_x_hat - of_g) rstd + dresidual_out with x_hat = (h - mean) rstd, g = dy weight.
struct RowFacts {
    float mean, rstd, of_x_hat, of_g;
};

// Rows that are computed together, so that what they add to dweight and dbias is added up in registers.
struct Together {
    int64_t count;
    const void *dy[MOST_TOGETHER], *h[MOST_TOGETHER], *dresidual_out[MOST_TOGETHER];
    RowFacts facts[MOST_TOGETHER];
};

// Sum x_hat g and g over a row.
template <class T>
void gradient_sums(const void *dy_row, const void *h_row, const float *weight, int64_t hidden, RowFacts facts, double (&totals)[2]) {
    auto dy = static_cast<const typename T::Memory *>(dy_row), h = static_cast<const typename T::Memory *>(h_row);
    by_sums<same<T, Split>>(hidden, totals, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
        // zero outside the row are dy and the padded weight, and so what is summed
        Pair x_hat = kept<same<T, Split>>((load<T>(h + start, pair, at) - facts.mean) * facts.rstd, pair, at);
        Pair g = load<T>(dy + start, pair, at) * load<Wide>(weight + start, pair, at);
        sums[0].terms[pair] = sums[0].terms[pair] + x_hat * g;
        sums[1].terms[pair] = sums[1].terms[pair] + g;
    });
}

// Write dh of some rows, each `hidden` after the one before, and add dy x_hat to dweight and dy to dbias, row by row.
template <class T, class Out, bool DRESIDUAL_OUT, bool ADDS>
void gradient(const Together &rows, const float *weight, void *out_rows, float *dweight, float *dbias, int64_t hidden) {
    typedef typename T::Memory Memory;
    by_pairs(hidden, [&](int64_t start, int pair, auto at) INLINED {
        Pair of_row = load<Wide>(weight + start, pair, at), to_weight{}, to_bias{};
        if (ADDS && dweight) {
            to_weight = load<Wide>(dweight + start, pair, at);
        }
        if (ADDS && dbias) {
            to_bias = load<Wide>(dbias + start, pair, at);
        }
        for (int64_t index = 0; index < rows.count; ++index) {
            const RowFacts &row = rows.facts[index];
            Pair dy = load<T>(static_cast<const Memory *>(rows.dy[index]) + start, pair, at);
            Pair x_hat = (load<T>(static_cast<const Memory *>(rows.h[index]) + start, pair, at) - row.mean) * row.rstd;
            if constexpr (ADDS) {
                to_weight = to_weight + dy * x_hat;
                to_bias = to_bias + dy;
            }
            if constexpr (!same<Out, Nothing>) {
                Pair dh = (dy * of_row - x_hat * row.of_x_hat - row.of_g) * row.rstd;
                if constexpr (DRESIDUAL_OUT) {
                    dh = dh + load<T>(static_cast<const Memory *>(rows.dresidual_out[index]) + start, pair, at);
                }
                store<Out>(dh, static_cast<typename Out::Memory *>(out_rows) + index * hidden + start, pair, at);
            }
        }
        if (ADDS && dweight) {
            store<Wide>(to_weight, dweight + start, pair, at);
        }
        if (ADDS && dbias) {
            store<Wide>(to_bias, dbias + start, pair, at);
        }
    });
}

typedef void (*GradientSums)(const void *, const void *, const float *, int64_t, RowFacts, double (&)[2]);
typedef void (*Gradient)(const Together &, const float *, void *, float *, float *, int64_t);

template <class T, class Out>
Gradient gradient_of(bool dresidual_out, bool adds) {
    if (dresidual_out) {
        return adds ? gradient<T, Out, true, true> : gradient<T, Out, true, false>;
    }
    return adds ? gradient<T, Out, false, true> : gradient<T, Out, false, false>;
}

// How the rows are read: all as bfloat16, all as float16, or each in float32, widened first where it is not.
enum class Reading { SPLIT, FLOAT16, FLOAT32 };

Reading reading_of(const Backward &call) {
    bool one = call.dy_dtype == call.h_dtype && (!call.dx || call.dx_dtype == call.h_dtype) && !call.dresidual;
    return is_split(call) ? Reading::SPLIT : one && call.h_dtype == FLOAT16 ? Reading::FLOAT16 : Reading::FLOAT32;
}

GradientSums gradient_sums_for(Reading reading) {
    return reading == Reading::SPLIT     ? gradient_sums<Split>
           : reading == Reading::FLOAT16 ? gradient_sums<Float16>
                                         : gradient_sums<Float32>;
}

Gradient gradient_for(Reading reading, int64_t dtype, bool dresidual_out, bool adds) {
    if (reading != Reading::FLOAT32) {
        return reading == Reading::SPLIT ? gradient_of<Split, Split>(dresidual_out, adds)
                                         : gradient_of<Float16, Float16>(dresidual_out, adds);
    }
    return with_dtype(dtype, [&](auto out) { return gradient_of<Float32, decltype(out)>(dresidual_out, adds); });
}

// What adds to dweight and dbias alone.
Gradient additions_for(Reading reading) {
    return reading == Reading::SPLIT     ? gradient<Split, Nothing, false, true>
           : reading == Reading::FLOAT16 ? gradient<Float16, Nothing, false, true>
                                         : gradient<Float32, Nothing, false, true>;
}

void backward_rows(const Backward &call, const Scratch &scratch, int64_t part, int64_t first, int64_t last, int64_t worker) {
    const int64_t hidden = call.hidden;
    const Reading reading = reading_of(call);
    const double one_of_hidden = 1.0 / double(hidden);
    float *dweight = call.dweight ? scratch.partial_dweight + part * scratch.padded : nullptr;
    float *dbias = call.dbias ? scratch.partial_dbias + part * scratch.padded : nullptr;
    if (dweight) {
        std::memset(dweight, 0, scratch.padded * sizeof *dweight);
    }
    if (dbias) {
        std::memset(dbias, 0, scratch.padded * sizeof *dbias);
    }
    const bool adds = dweight || dbias, has_rows = call.dx || call.dresidual;
    const GradientSums sums_row = gradient_sums_for(reading);
    Together rows;
    auto read_row = [&](const void *array, Rows strides, int64_t row, int64_t dtype, int64_t kind) {
        auto own = row_of(array, strides, row, call.inner_rows, dtype);
        int64_t index = kind * scratch.batch + rows.count;
        return reading != Reading::FLOAT32 ? own : widened(own, dtype, hidden, scratch.row(worker, index));
    };
    auto compute = [&](Gradient function, void *out, int64_t dtype, float *to_dweight, float *to_dbias) {
        function(rows, scratch.weight, from(out, first * hidden, dtype), to_dweight, to_dbias, hidden);
    };
    for (; first < last; first += rows.count) {
        for (rows.count = 0; rows.count < scratch.batch && first + rows.count < last; ++rows.count) {
            int64_t row = first + rows.count;
            auto dy = rows.dy[rows.count] = read_row(call.dy, call.dy_rows, row, call.dy_dtype, 0);
            auto h = rows.h[rows.count] = read_row(call.h, call.h_rows, row, call.h_dtype, 1);
            RowFacts &facts = rows.facts[rows.count] = {call.mean ? call.mean[row] : 0.0f, call.rstd[row], 0.0f, 0.0f};
            if (has_rows) {
                rows.dresidual_out[rows.count] = read_row(call.dresidual_out, call.dresidual_out_rows, row, call.h_dtype, 2);
                double totals[2];
                sums_row(dy, h, scratch.weight, hidden, facts, totals);
                facts.of_x_hat = float(totals[0] * one_of_hidden);
                facts.of_g = call.mean ? float(totals[1] * one_of_hidden) : 0.0f;
            }
        }
        if (call.dx) {
            compute(gradient_for(reading, call.dx_dtype, call.dresidual_out, adds), call.dx, call.dx_dtype, dweight, dbias);
        } else if (adds) {
            compute(additions_for(reading), nullptr, FLOAT32, dweight, dbias);
        }
        if (call.dresidual) {
            const Gradient function = gradient_for(reading, call.dresidual_dtype, call.dresidual_out, false);
            compute(function, call.dresidual, call.dresidual_dtype, nullptr, nullptr);
        }
    }
}

// The order of the memory again, after `in_order`.
ALWAYS Pair in_memory_order(Pair values, bool split) {
    if (split) {
        float to[IN_PAIR];
        for (int lane = 0; lane < LANES; ++lane) {
            to[2 * lane] = values.first[lane];
            to[2 * lane + 1] = values.second[lane];
        }
        values = load<Wide>(to, 0, Whole{});
    }
    return values;
}

// Add up the partial sums of the columns from first to last in the first of them, part by part, and write these as dtype.
void total(float *partial, int64_t parts, int64_t padded, int64_t first, int64_t last, bool split, int64_t dtype, void *out) {
    float *sums = partial + first;
    const int64_t count = last - first;
    for (int64_t part = 1; part < parts; ++part) {
        const float *own = sums + part * padded;
        by_pairs(count, [&](int64_t start, int pair, auto at) INLINED {
            store<Wide>(load<Wide>(sums + start, pair, at) + load<Wide>(own + start, pair, at), sums + start, pair, at);
        });
    }
    with_dtype(dtype, [&](auto of) {
        typedef decltype(of) T;
        auto row = static_cast<typename T::Memory *>(out) + first;
        by_pairs(count, [&](int64_t start, int pair, auto at) INLINED {
            store<T>(in_memory_order(load<Wide>(sums + start, pair, at), split), row + start, pair, at);
        });
    });
}

}  // namespace
