// SPDX-License-Identifier: Apache-2.0
// The forward pass of rows in two or three passes over each: h and a sum, for LayerNorm the centred squares, y.
#pragma once
#include "loops.hpp"

namespace {

// Rows of one array, or parts of rows, `step` elements apart.
struct Lines {
    const void *first;
    int64_t step;

    template <class T>
    ALWAYS typename T::Memory *at(int64_t row) const {
        return static_cast<typename T::Memory *>(const_cast<void *>(first)) + row * step;
    }
};

// Rows that are computed together, pass by pass, because the steps from one pass to the next are a long wait for a short row.
struct Batch {
    Lines x, residual, residual_out, y;
    Lines wide;  // memory for h in float32
    Lines h;     // where that is in the end
    const void *weight, *bias;
    int64_t count, length;
    int64_t after;  // rows that the same thread computes next
    double totals[MOST_IN_BATCH];
    Statistics statistics[MOST_IN_BATCH];
};

// h = x + residual into residual_out, and in float32 into `wide`, where neither x nor residual_out is that, or residual_out is
// streamed. The totals are the sums of h, or of its squares.
template <class X, class Residual, class Out, bool STORED, bool SUBTRACT_MEAN, bool STREAMS>
void add(Batch &batch) {
    const int64_t count = batch.count, length = batch.length;
    for (int64_t row = 0; row < count; ++row) {
        auto x = batch.x.at<X>(row);
        auto residual = batch.residual.at<Residual>(row);
        auto out = batch.residual_out.at<Out>(row);
        auto wide = batch.wide.at<Wide>(row);
        double total[1];
        by_sums<same<X, Split>>(length, total, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
            Pair h = load<X>(x + start, pair, at);
            if constexpr (!same<Residual, Nothing>) {
                h = h + load<Residual>(residual + start, pair, at);
            }
            if constexpr (!same<Out, Nothing>) {
                Pair written = store<Out>(h, out + start, pair, at.template past_caches<STREAMS>());
                if constexpr (STORED) {
                    h = written;
                }
            }
            constexpr bool OUT_IS_H = same<Out, Float32> && !STREAMS;
            if constexpr (!OUT_IS_H && !(same<X, Float32> && same<Residual, Nothing> && same<Out, Nothing>)) {
                store<Wide>(h, wide + start, pair, at);
            }
            sums->terms[pair] = sums->terms[pair] + (SUBTRACT_MEAN ? h : h * h);
        });
        batch.totals[row] = total[0];
    }
}

template <class H>
void sum(Batch &batch) {
    for (int64_t row = 0; row < batch.count; ++row) {
        auto h = batch.h.at<H>(row);
        double total[1];
        by_sums<same<H, Split>>(batch.length, total, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
            sums->terms[pair] = sums->terms[pair] + load<H>(h + start, pair, at);
        });
        batch.totals[row] = total[0];
    }
}

template <class H, bool SPLIT>
void sum_of_squares(Batch &batch) {
    for (int64_t row = 0; row < batch.count; ++row) {
        auto h = batch.h.at<H>(row);
        const float mean = batch.statistics[row].mean;
        double total[1];
        by_sums<SPLIT>(batch.length, total, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
            Pair centred = kept<SPLIT>(load<H>(h + start, pair, at) - mean, pair, at);
            sums->terms[pair] = sums->terms[pair] + centred * centred;
        });
        batch.totals[row] = total[0];
    }
}

// y = x_hat weight + bias, with x_hat rounded to Hat, in the order that is best for memory: rows of 16 bits that come next are fetched
// meanwhile; rows of float32 are taken from their ends.
template <class Y, class Hat, class Parameter, bool STREAMS, bool MEAN, bool WEIGHT, bool BIAS>
void normalise(Batch &batch) {
    typedef Choice<same<Y, Split>, Wide, Float32> H;
    const int64_t count = batch.count, length = batch.length;
    auto weight = static_cast<const typename Parameter::Memory *>(batch.weight);
    auto bias = static_cast<const typename Parameter::Memory *>(batch.bias);
    for (int64_t row = 0; row < count; ++row) {
        auto h = batch.h.at<H>(row);
        auto y = batch.y.at<Y>(row);
        // never a row of another thread, which may be writing it
        const int64_t next = row < batch.after ? row + count : row;
        auto next_x = batch.x.at<Y>(next);
        auto next_residual = batch.residual.first ? batch.residual.at<Y>(next) : next_x;
        const float mean = batch.statistics[row].mean, rstd = batch.statistics[row].rstd;
        auto element = [&](int64_t start, int pair, auto at) INLINED {
            if (sizeof *y == 2 && pair * IN_PAIR * sizeof *y % CACHE_LINE == 0) {
                __builtin_prefetch(next_x + start + pair * IN_PAIR);
                __builtin_prefetch(next_residual + start + pair * IN_PAIR);
            }
            Pair value = load<H>(h + start, pair, at);
            value = (MEAN ? value - mean : value) * rstd;
            if constexpr (!same<Hat, Float32>) {
                value = rounded<Hat>(value);
            }
            if constexpr (WEIGHT) {
                value = value * load<Parameter>(weight + start, pair, at);
            }
            if constexpr (BIAS) {
                value = value + load<Parameter>(bias + start, pair, at);
            }
            store<Y>(value, y + start, pair, at.template past_caches<STREAMS>());
        };
        sizeof *y == 2 ? by_pairs(length, element) : by_pairs_from_end(length, element);
    }
}

typedef void (*Compute)(Batch &);

template <class Function>
ALWAYS auto with_dtype(int64_t dtype, Function function) {
    return dtype == FLOAT32 ? function(Float32{}) : dtype == BFLOAT16 ? function(BFloat16{}) : function(Float16{});
}

// Even and odd elements of the pair, where the rows that it is combined with are Split.
ALWAYS Pair in_order(Pair values, bool split) {
    if (split) {
        float from[IN_PAIR];
        store<Wide>(values, from, 0, Whole{});
        for (int lane = 0; lane < LANES; ++lane) {
            values.first[lane] = from[2 * lane];
            values.second[lane] = from[2 * lane + 1];
        }
    }
    return values;
}

// offset + values as float32; without an offset the values alone, because adding zero would change the sign of a zero.
void widen(const void *values, int64_t dtype, bool split, int64_t count, double offset, float *out) {
    auto widen_as = [&](auto of) {
        typedef decltype(of) T;
        auto row = static_cast<const typename T::Memory *>(values);
        by_pairs(count, [&](int64_t start, int pair, auto at) INLINED {
            Pair wide = load<T>(row + start, pair, at);
            if (!same<T, Split>) {
                wide = in_order(wide, split);
            }
            if (offset) {
                wide = each(wide, [&](Floats v) { return v + float(offset); });
            }
            store<Wide>(split ? each(wide, without_payload) : wide, out + start, pair, at);
        });
    };
    dtype == BFLOAT16 && split ? widen_as(Split{}) : with_dtype(dtype, widen_as);
}

template <bool STREAMS, class X, class Residual, class Out>
Compute add_of(bool stored, bool subtract_mean) {
    if constexpr (!same<Out, Nothing> && !same<Out, Float32>) {
        if (stored) {
            return subtract_mean ? add<X, Residual, Out, true, true, STREAMS> : add<X, Residual, Out, true, false, STREAMS>;
        }
    }
    return subtract_mean ? add<X, Residual, Out, false, true, STREAMS> : add<X, Residual, Out, false, false, STREAMS>;
}

// Null for a combination of dtypes that is rare: it is computed from x and residual in float32.
template <bool STREAMS>
Compute add_for(const Forward &call) {
    bool stored = call.rounding != SUM, mean = call.subtract_mean;
    if (is_split(call)) {
        return call.residual       ? add_of<STREAMS, Split, Split, Split>(stored, mean)
               : call.residual_out ? add_of<STREAMS, Split, Nothing, Split>(stored, mean)
                                   : add_of<false, Split, Nothing, Nothing>(stored, mean);
    }
    return with_dtype(call.x_dtype, [&](auto x) -> Compute {
        typedef decltype(x) X;
        if (!call.residual_out) {
            return add_of<false, X, Nothing, Nothing>(stored, mean);
        }
        return with_dtype(call.residual_out_dtype, [&](auto out) -> Compute {
            typedef decltype(out) Out;
            if constexpr (same<X, Float32> || same<Out, Float32>) {
                if (!call.residual) {
                    return add_of<STREAMS, X, Nothing, Out>(stored, mean);
                }
                if (call.residual_dtype == FLOAT32) {
                    return add_of<STREAMS, X, Float32, Out>(stored, mean);
                }
            }
            if constexpr (same<X, Out> && !same<X, Float32>) {
                if (call.residual && call.residual_dtype == call.x_dtype) {
                    return add_of<STREAMS, X, X, X>(stored, mean);
                }
            }
            return nullptr;
        });
    });
}

template <class Y, class Hat, class Parameter, bool STREAMS, bool MEAN>
Compute normalise_with(bool weight, bool bias) {
    return !weight ? normalise<Y, Hat, Parameter, STREAMS, MEAN, false, false>
           : bias  ? normalise<Y, Hat, Parameter, STREAMS, MEAN, true, true>
                   : normalise<Y, Hat, Parameter, STREAMS, MEAN, true, false>;
}

template <class Y, class Hat, class Parameter, bool STREAMS>
Compute normalise_of(bool mean, bool weight, bool bias) {
    return mean ? normalise_with<Y, Hat, Parameter, STREAMS, true>(weight, bias)
                : normalise_with<Y, Hat, Parameter, STREAMS, false>(weight, bias);
}

template <bool STREAMS>
Compute normalise_for(const Forward &call, bool wide_parameters, bool weight, bool bias) {
    const bool mean = call.subtract_mean;
    int64_t hat_dtype = call.rounding == HF ? call.x_dtype : FLOAT32;
    if (is_split(call)) {
        if (hat_dtype == FLOAT32) {
            return wide_parameters ? normalise_of<Split, Float32, Wide, STREAMS>(mean, weight, bias)
                                   : normalise_of<Split, Float32, Split, STREAMS>(mean, weight, bias);
        }
        return wide_parameters ? normalise_of<Split, Split, Wide, STREAMS>(mean, weight, bias)
                               : normalise_of<Split, Split, Split, STREAMS>(mean, weight, bias);
    }
    return with_dtype(call.y_dtype, [&](auto y) {
        typedef decltype(y) Y;
        return with_dtype(hat_dtype, [&](auto hat) {
            typedef decltype(hat) Hat;
            if constexpr (same<Hat, Float32> || same<Hat, Y>) {
                if (!wide_parameters) {
                    return normalise_of<Y, Hat, Y, STREAMS>(mean, weight, bias);
                }
            }
            return normalise_of<Y, Hat, Float32, STREAMS>(mean, weight, bias);
        });
    });
}

}  // namespace
