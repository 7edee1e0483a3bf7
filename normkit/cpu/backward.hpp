// SPDX-License-Identifier: Apache-2.0
// The backward pass of one row in two passes over it: two sums and its terms of dweight and dbias; dx and dresidual.
#pragma once
#include "row.hpp"

namespace {

// The constants of a row: dh = (g - x_hat of_x_hat - of_g) rstd + dresidual_out with x_hat = (h - mean) rstd, g = dy weight.
struct RowFacts {
    float mean, rstd, of_x_hat, of_g;
};

// Sum x_hat g and g over a row, and add dy x_hat to dweight and dy to dbias.
template <class T, bool DWEIGHT, bool DBIAS>
void gradient_sums(const void *dy_row, const void *h_row, const float *weight, float *dweight, float *dbias, int64_t hidden,
                   const RowFacts &facts, double (&totals)[2]) {
    auto dy = static_cast<const typename T::Memory *>(dy_row), h = static_cast<const typename T::Memory *>(h_row);
    const float mean = facts.mean, rstd = facts.rstd;
    by_sums<same<T, Split>>(hidden, totals, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
        // zero outside the row are dy and the padded weight, and so what is summed
        Pair given = load<T>(dy + start, pair, at);
        Pair x_hat = kept<same<T, Split>>((load<T>(h + start, pair, at) - mean) * rstd, pair, at);
        Pair g = given * load<Wide>(weight + start, pair, at);
        sums[0].terms[pair] = sums[0].terms[pair] + x_hat * g;
        sums[1].terms[pair] = sums[1].terms[pair] + g;
        if constexpr (DWEIGHT) {
            store<Wide>(load<Wide>(dweight + start, pair, at) + given * x_hat, dweight + start, pair, at);
        }
        if constexpr (DBIAS) {
            store<Wide>(load<Wide>(dbias + start, pair, at) + given, dbias + start, pair, at);
        }
    });
}

template <class T, class Out, bool DRESIDUAL_OUT>
void gradient(const void *dy_row, const void *h_row, const void *dresidual_out_row, const float *weight, void *out_row,
              int64_t hidden, const RowFacts &facts) {
    auto dy = static_cast<const typename T::Memory *>(dy_row), h = static_cast<const typename T::Memory *>(h_row);
    auto dresidual_out = static_cast<const typename T::Memory *>(dresidual_out_row);
    auto out = static_cast<typename Out::Memory *>(out_row);
    const RowFacts row = facts;
    by_pairs(hidden, [&](int64_t start, int pair, auto at) INLINED {
        Pair g = load<T>(dy + start, pair, at) * load<Wide>(weight + start, pair, at);
        Pair x_hat = (load<T>(h + start, pair, at) - row.mean) * row.rstd;
        Pair dh = (g - x_hat * row.of_x_hat - row.of_g) * row.rstd;
        if constexpr (DRESIDUAL_OUT) {
            dh = dh + load<T>(dresidual_out + start, pair, at);
        }
        store<Out>(dh, out + start, pair, at);
    });
}

typedef void (*GradientSums)(const void *, const void *, const float *, float *, float *, int64_t, const RowFacts &, double (&)[2]);
typedef void (*Gradient)(const void *, const void *, const void *, const float *, void *, int64_t, const RowFacts &);

template <class T>
GradientSums gradient_sums_of(bool dweight, bool dbias) {
    if (dweight) {
        return dbias ? gradient_sums<T, true, true> : gradient_sums<T, true, false>;
    }
    return dbias ? gradient_sums<T, false, true> : gradient_sums<T, false, false>;
}

template <class T, class Out>
Gradient gradient_of(bool dresidual_out) {
    return dresidual_out ? gradient<T, Out, true> : gradient<T, Out, false>;
}

// How the rows are read: all as bfloat16, all as float16, or each in float32, widened first where it is not.
enum class Reading { SPLIT, FLOAT16, FLOAT32 };

Reading reading_of(const Backward &call) {
    bool one = call.dy_dtype == call.h_dtype && (!call.dx || call.dx_dtype == call.h_dtype) && !call.dresidual;
    return is_split(call) ? Reading::SPLIT : one && call.h_dtype == FLOAT16 ? Reading::FLOAT16 : Reading::FLOAT32;
}

GradientSums gradient_sums_for(Reading reading, bool dweight, bool dbias) {
    return reading == Reading::SPLIT     ? gradient_sums_of<Split>(dweight, dbias)
           : reading == Reading::FLOAT16 ? gradient_sums_of<Float16>(dweight, dbias)
                                         : gradient_sums_of<Float32>(dweight, dbias);
}

Gradient gradient_for(Reading reading, int64_t dtype, bool dresidual_out) {
    if (reading != Reading::FLOAT32) {
        return reading == Reading::SPLIT ? gradient_of<Split, Split>(dresidual_out) : gradient_of<Float16, Float16>(dresidual_out);
    }
    return with_dtype(dtype, [&](auto out) { return gradient_of<Float32, decltype(out)>(dresidual_out); });
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
    const GradientSums sums_row = gradient_sums_for(reading, dweight, dbias);
    const Gradient dx_row = gradient_for(reading, call.dx_dtype, call.dresidual_out);
    const Gradient dresidual_row = gradient_for(reading, call.dresidual_dtype, call.dresidual_out);
    auto read_row = [&](const void *array, Rows rows, int64_t row, int64_t dtype, int64_t index) {
        auto own = row_of(array, rows, row, call.inner_rows, dtype);
        return reading != Reading::FLOAT32 ? own : widened(own, dtype, hidden, scratch.row(worker, index));
    };
    for (int64_t row = first; row < last; ++row) {
        auto dy = read_row(call.dy, call.dy_rows, row, call.dy_dtype, 0);
        auto h = read_row(call.h, call.h_rows, row, call.h_dtype, 1);
        RowFacts facts{call.mean ? call.mean[row] : 0.0f, call.rstd[row], 0.0f, 0.0f};
        double totals[2];
        sums_row(dy, h, scratch.weight, dweight, dbias, hidden, facts, totals);
        facts.of_x_hat = float(totals[0] * one_of_hidden);
        facts.of_g = call.mean ? float(totals[1] * one_of_hidden) : 0.0f;
        if (!call.dx && !call.dresidual) {
            continue;
        }
        auto dresidual_out = read_row(call.dresidual_out, call.dresidual_out_rows, row, call.h_dtype, 2);
        if (call.dx) {
            auto dx = row_of(call.dx, Rows{hidden, 0}, row, 1, call.dx_dtype);
            dx_row(dy, h, dresidual_out, scratch.weight, dx, hidden, facts);
        }
        if (call.dresidual) {
            auto dresidual = row_of(call.dresidual, Rows{hidden, 0}, row, 1, call.dresidual_dtype);
            dresidual_row(dy, h, dresidual_out, scratch.weight, dresidual, hidden, facts);
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
