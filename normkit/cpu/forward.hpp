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

// `ahead` are rows that are needed next: fetched from memory meanwhile, as if they were of y's dtype.
// y = x_hat weight + bias, with x_hat rounded to Hat.
template <class Y, class Hat, class Parameter, bool WEIGHT, bool BIAS>
void normalise(const float *h, const void *weight_row, const void *bias_row, void *y_row, int64_t hidden, float mean, float rstd,
               const void *const *ahead) {
    auto weight = static_cast<const typename Parameter::Memory *>(weight_row);
    auto bias = static_cast<const typename Parameter::Memory *>(bias_row);
    auto y = static_cast<typename Y::Memory *>(y_row);
    typedef Choice<same<Y, Split>, Wide, Float32> H;
    by_pairs(hidden, [&](int64_t start, int pair, auto at) INLINED {
        if (pair * IN_PAIR * sizeof *y % CACHE_LINE == 0) {
            __builtin_prefetch(static_cast<const char *>(ahead[0]) + (start + pair * IN_PAIR) * sizeof *y);
            __builtin_prefetch(static_cast<const char *>(ahead[1]) + (start + pair * IN_PAIR) * sizeof *y);
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
typedef void (*Normalise)(const float *, const void *, const void *, void *, int64_t, float, float, const void *const *);

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

ALWAYS int64_t element(Rows rows, int64_t row, int64_t inner_rows) {
    return inner_rows == 1 ? row * rows.outer : row / inner_rows * rows.outer + row % inner_rows * rows.inner;
}

ALWAYS int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

template <class Pointer>
ALWAYS Pointer row_of(Pointer array, Rows rows, int64_t row, int64_t inner_rows, int64_t dtype) {
    typedef decltype(array) Same;
    return array ? (Same)((char *)array + element(rows, row, inner_rows) * size_of(dtype)) : nullptr;
}

ALWAYS float reciprocal_root(double sum_of_squares, double one_of_hidden, float eps) {
    return 1.0f / __builtin_sqrtf(float(sum_of_squares * one_of_hidden) + eps);
}

// An array's rows in float32, exactly: those of dtypes that `add` does not know side by side.
const void *widened(const void *row, int64_t dtype, int64_t hidden, float *wide) {
    widen(row, dtype, false, hidden, 0.0, wide);
    return wide;
}

void forward_rows(const Forward &given, const Scratch &scratch, int64_t first, int64_t last, int64_t worker) {
    Forward call = given;
    const int64_t hidden = call.hidden, inner_rows = call.inner_rows;
    const bool keeps_other = call.residual_out && call.residual_out_dtype != FLOAT32;
    // the backward pass has the rounded h, and needs the statistics of just that
    const bool statistics_of_rounded = call.rstd && keeps_other && call.rounding == SUM;
    const bool x_is_h = !call.residual_out && call.x_dtype == FLOAT32, out_is_h = call.residual_out && !keeps_other;
    const void *weight = scratch.weight ? scratch.weight : call.weight, *bias = scratch.bias ? scratch.bias : call.bias;
    const Normalise normalise_row = normalise_for(call, scratch.weight || scratch.bias, weight, bias);
    Add add_row = add_for(call);
    const bool rare = !add_row, split = is_split(call);
    if (rare) {
        call.x_dtype = call.residual_dtype = FLOAT32;
        add_row = add_for(call);
    }
    const double one_of_hidden = 1.0 / double(hidden);
    const float eps = float(call.eps);
    float *wide = scratch.row(worker, 0);
    for (int64_t row = first; row < last; ++row) {
        auto x = row_of(call.x, call.x_rows, row, inner_rows, given.x_dtype);
        auto residual = row_of(call.residual, call.residual_rows, row, inner_rows, given.residual_dtype);
        auto out = row_of(call.residual_out, call.residual_out_rows, row, inner_rows, call.residual_out_dtype);
        auto y = row_of(call.y, call.y_rows, row, inner_rows, call.y_dtype);
        if (rare) {
            x = widened(x, given.x_dtype, hidden, scratch.row(worker, 1));
            residual = residual ? widened(residual, given.residual_dtype, hidden, scratch.row(worker, 2)) : residual;
        }
        double total = add_row(x, residual, out, wide, hidden);
        auto h = x_is_h ? static_cast<const float *>(x) : out_is_h ? static_cast<const float *>(out) : wide;
        float mean = 0.0f;
        if (call.subtract_mean) {
            mean = float(total * one_of_hidden);
            total = split ? sum_of_squares<Wide, true>(h, hidden, mean) : sum_of_squares<Float32, false>(h, hidden, mean);
        }
        float rstd = reciprocal_root(total, one_of_hidden, eps);
        int64_t after = row + 1 < last ? row + 1 : row;
        const void *ahead[] = {row_of(call.x, call.x_rows, after, inner_rows, given.x_dtype), y};
        if (call.residual) {
            ahead[1] = row_of(call.residual, call.residual_rows, after, inner_rows, given.residual_dtype);
        }
        normalise_row(h, weight, bias, y, hidden, mean, rstd, ahead);
        if (statistics_of_rounded) {
            bool brain = call.residual_out_dtype == BFLOAT16;
            mean = call.subtract_mean ? float((brain ? sum<BFloat16> : sum<Float16>)(out, hidden) * one_of_hidden) : 0.0f;
            total = (brain ? sum_of_squares<BFloat16, false> : sum_of_squares<Float16, false>)(out, hidden, mean);
            rstd = reciprocal_root(total, one_of_hidden, eps);
        }
        if (call.mean) {
            call.mean[row] = mean;
        }
        if (call.rstd) {
            call.rstd[row] = rstd;
        }
    }
}

}  // namespace
