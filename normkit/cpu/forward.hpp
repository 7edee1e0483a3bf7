// SPDX-License-Identifier: Apache-2.0
// The forward pass of one row in two or three passes over it: h and a sum, for LayerNorm the centred squares, y.
#pragma once
#include "loops.hpp"

namespace {

// h = x + residual into residual_out, and in float32 into `wide`, where neither x nor residual_out is that. The result is the sum
// of h, or of its squares.
template <class X, class Residual, class Out, bool STORED, bool SUBTRACT_MEAN>
double add(const void *x_row, const void *residual_row, void *out_row, float *wide, int64_t hidden) {
    auto x = static_cast<const typename X::Memory *>(x_row);
    auto residual = static_cast<const typename Residual::Memory *>(residual_row);
    auto out = static_cast<typename Out::Memory *>(out_row);
    double total[1];
    by_sums<same<X, Split>>(hidden, total, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
        Pair h = load<X>(x + start, pair, at);
        if constexpr (!same<Residual, Nothing>) {
            h = h + load<Residual>(residual + start, pair, at);
        }
        if constexpr (!same<Out, Nothing>) {
            Pair written = store<Out>(h, out + start, pair, at);
            if constexpr (STORED) {
                h = written;
            }
        }
        if constexpr (!same<Out, Float32> && !(same<X, Float32> && same<Residual, Nothing> && same<Out, Nothing>)) {
            store<Wide>(h, wide + start, pair, at);
        }
        sums->terms[pair] = sums->terms[pair] + (SUBTRACT_MEAN ? h : h * h);
    });
    return total[0];
}

template <class H>
double sum(const void *h_row, int64_t hidden) {
    auto h = static_cast<const typename H::Memory *>(h_row);
    double total[1];
    by_sums<same<H, Split>>(hidden, total, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
        sums->terms[pair] = sums->terms[pair] + load<H>(h + start, pair, at);
    });
    return total[0];
}

template <class H, bool SPLIT>
double sum_of_squares(const void *h_row, int64_t hidden, float mean) {
    auto h = static_cast<const typename H::Memory *>(h_row);
    double total[1];
    by_sums<SPLIT>(hidden, total, [&](int64_t start, int pair, auto at, Sums *sums) INLINED {
        Pair centred = kept<SPLIT>(load<H>(h + start, pair, at) - mean, pair, at);
        sums->terms[pair] = sums->terms[pair] + centred * centred;
    });
    return total[0];
}

template <bool CONDITION, class Yes, class No>
struct Chosen {
    typedef Yes Type;
};
template <class Yes, class No>
struct Chosen<false, Yes, No> {
    typedef No Type;
};
template <bool CONDITION, class Yes, class No>
using Choice = typename Chosen<CONDITION, Yes, No>::Type;

constexpr int64_t CACHE_LINE = 64;

// Rows that are needed next.
struct Ahead {
    const void *x, *residual;
};

// y = x_hat weight + bias, with x_hat rounded to Hat. Rows of 16 bits are fetched ahead from memory meanwhile; for float32, where
// there is less to compute, the processor does that as well by itself.
template <class Y, class Hat, class Parameter, bool WEIGHT, bool BIAS>
void normalise(const float *h, const void *weight_row, const void *bias_row, void *y_row, int64_t hidden, float mean, float rstd,
               const Ahead &ahead) {
    auto weight = static_cast<const typename Parameter::Memory *>(weight_row);
    auto bias = static_cast<const typename Parameter::Memory *>(bias_row);
    auto y = static_cast<typename Y::Memory *>(y_row);
    typedef Choice<same<Y, Split>, Wide, Float32> H;
    by_pairs(hidden, [&](int64_t start, int pair, auto at) INLINED {
        if (sizeof *y == 2 && pair * IN_PAIR * sizeof *y % CACHE_LINE == 0) {
            __builtin_prefetch(static_cast<const char *>(ahead.x) + (start + pair * IN_PAIR) * sizeof *y);
            __builtin_prefetch(static_cast<const char *>(ahead.residual) + (start + pair * IN_PAIR) * sizeof *y);
        }
        Pair value = (load<H>(h + start, pair, at) - mean) * rstd;
        if constexpr (!same<Hat, Float32>) {
            value = rounded<Hat>(value);
        }
        if constexpr (WEIGHT) {
            value = value * load<Parameter>(weight + start, pair, at);
        }
        if constexpr (BIAS) {
            value = value + load<Parameter>(bias + start, pair, at);
        }
        store<Y>(value, y + start, pair, at);
    });
}

typedef double (*Add)(const void *, const void *, void *, float *, int64_t);
typedef double (*Sum)(const void *, int64_t);
typedef double (*SumOfSquares)(const void *, int64_t, float);
typedef void (*Normalise)(const float *, const void *, const void *, void *, int64_t, float, float, const Ahead &);

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
            store<Wide>(offset ? each(wide, [&](Floats v) { return v + float(offset); }) : wide, out + start, pair, at);
        });
    };
    dtype == BFLOAT16 && split ? widen_as(Split{}) : with_dtype(dtype, widen_as);
}

template <class X, class Residual, class Out>
Add add_of(bool stored, bool subtract_mean) {
    if constexpr (!same<Out, Nothing> && !same<Out, Float32>) {
        if (stored) {
            return subtract_mean ? add<X, Residual, Out, true, true> : add<X, Residual, Out, true, false>;
        }
    }
    return subtract_mean ? add<X, Residual, Out, false, true> : add<X, Residual, Out, false, false>;
}

// Null for a combination of dtypes that is rare: it is computed from x and residual in float32.
Add add_for(const Forward &call) {
    bool stored = call.rounding != SUM, mean = call.subtract_mean;
    if (is_split(call)) {
        return call.residual       ? add_of<Split, Split, Split>(stored, mean)
               : call.residual_out ? add_of<Split, Nothing, Split>(stored, mean)
                                   : add_of<Split, Nothing, Nothing>(stored, mean);
    }
    return with_dtype(call.x_dtype, [&](auto x) -> Add {
        typedef decltype(x) X;
        if (!call.residual_out) {
            return add_of<X, Nothing, Nothing>(stored, mean);
        }
        return with_dtype(call.residual_out_dtype, [&](auto out) -> Add {
            typedef decltype(out) Out;
            if constexpr (same<X, Float32> || same<Out, Float32>) {
                if (!call.residual) {
                    return add_of<X, Nothing, Out>(stored, mean);
                }
                if (call.residual_dtype == FLOAT32) {
                    return add_of<X, Float32, Out>(stored, mean);
                }
            }
            if constexpr (same<X, Out> && !same<X, Float32>) {
                if (call.residual && call.residual_dtype == call.x_dtype) {
                    return add_of<X, X, X>(stored, mean);
                }
            }
            return nullptr;
        });
    });
}

template <class Y, class Hat, class Parameter>
Normalise normalise_of(bool weight, bool bias) {
    return !weight ? normalise<Y, Hat, Parameter, false, false>
           : bias  ? normalise<Y, Hat, Parameter, true, true>
                   : normalise<Y, Hat, Parameter, true, false>;
}

Normalise normalise_for(const Forward &call, bool wide_parameters, bool weight, bool bias) {
    int64_t hat_dtype = call.rounding == HF ? call.x_dtype : FLOAT32;
    if (is_split(call)) {
        if (hat_dtype == FLOAT32) {
            return wide_parameters ? normalise_of<Split, Float32, Wide>(weight, bias)
                                   : normalise_of<Split, Float32, Split>(weight, bias);
        }
        return wide_parameters ? normalise_of<Split, Split, Wide>(weight, bias) : normalise_of<Split, Split, Split>(weight, bias);
    }
    return with_dtype(call.y_dtype, [&](auto y) {
        typedef decltype(y) Y;
        return with_dtype(hat_dtype, [&](auto hat) {
            typedef decltype(hat) Hat;
            if constexpr (same<Hat, Float32> || same<Hat, Y>) {
                if (!wide_parameters) {
                    return normalise_of<Y, Hat, Y>(weight, bias);
                }
            }
            return normalise_of<Y, Hat, Float32>(weight, bias);
        });
    });
}

}  // namespace
