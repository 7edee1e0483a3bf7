// SPDX-License-Identifier: Apache-2.0
// The forward pass of one row in two or three passes over it: h and a sum, for LayerNorm the centred squares, y.
#pragma once
#include "vectors.hpp"

namespace {

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// h = x + residual into residual_out, and in float32 into `wide`, where neither x nor residual_out is that. The result is the sum
// of h, or of its squares.
template <class X, class Residual, class Out, bool STORED, bool SUBTRACT_MEAN>
double add(const void *x_row, const void *residual_row, void *out_row, float *wide, int64_t hidden) {
    auto x = static_cast<const typename X::Memory *>(x_row);
    auto residual = static_cast<const typename Residual::Memory *>(residual_row);
    auto out = static_cast<typename Out::Memory *>(out_row);
    double total[1];
    by_sums(hidden, total, [&](int64_t start, int vector, auto part, Sums *sums) __attribute__((always_inline)) {
        Floats h = load<X>(x, start, vector, part);
        if constexpr (!same<Residual, Nothing>) {
            h += load<Residual>(residual, start, vector, part);
        }
        if constexpr (!same<Out, Nothing>) {
            typename Out::Packed packed = Out::narrow(h);
            store<Out>(packed, out, start, vector, part);
            if constexpr (STORED) {
                h = Out::widen(packed);
            }
        }
        if constexpr (!same<Out, Float32> && !(same<X, Float32> && same<Residual, Nothing> && same<Out, Nothing>)) {
            store<Float32>(h, wide, start, vector, part);
        }
        sums->terms[vector] += SUBTRACT_MEAN ? h : h * h;
    });
    return total[0];
}

template <class H>
double sum(const void *h_row, int64_t hidden) {
    auto h = static_cast<const typename H::Memory *>(h_row);
    double total[1];
    by_sums(hidden, total, [&](int64_t start, int vector, auto part, Sums *sums) __attribute__((always_inline)) {
        sums->terms[vector] += load<H>(h, start, vector, part);
    });
    return total[0];
}

template <class H>
double sum_of_squares(const void *h_row, int64_t hidden, float mean) {
    auto h = static_cast<const typename H::Memory *>(h_row);
    double total[1];
    by_sums(hidden, total, [&](int64_t start, int vector, auto part, Sums *sums) __attribute__((always_inline)) {
        Floats centred = kept(load<H>(h, start, vector, part) - mean, vector, part);
        sums->terms[vector] += centred * centred;
    });
    return total[0];
}

// y = x_hat weight + bias, with x_hat rounded to Hat.
template <class Y, class Hat, class Parameter, bool WEIGHT, bool BIAS>
void normalise(const float *h, const void *weight_row, const void *bias_row, void *y_row, int64_t hidden, float mean, float rstd) {
    auto weight = static_cast<const typename Parameter::Memory *>(weight_row);
    auto bias = static_cast<const typename Parameter::Memory *>(bias_row);
    auto y = static_cast<typename Y::Memory *>(y_row);
    by_vectors(0, hidden, [&](int64_t start, int vector, auto part) __attribute__((always_inline)) {
        Floats value = (load<Float32>(h, start, vector, part) - mean) * rstd;
        value = Hat::widen(Hat::narrow(value));
        if constexpr (WEIGHT) {
            value *= load<Parameter>(weight, start, vector, part);
        }
        if constexpr (BIAS) {
            value += load<Parameter>(bias, start, vector, part);
        }
        store<Y>(Y::narrow(value), y, start, vector, part);
    });
}

typedef double (*Add)(const void *, const void *, void *, float *, int64_t);
typedef double (*Sum)(const void *, int64_t);
typedef double (*SumOfSquares)(const void *, int64_t, float);
typedef void (*Normalise)(const float *, const void *, const void *, void *, int64_t, float, float);

template <class Function>
ALWAYS auto with_dtype(int64_t dtype, Function function) {
    return dtype == FLOAT32 ? function(Float32{}) : dtype == BFLOAT16 ? function(BFloat16{}) : function(Float16{});
}

// weight_offset + values, or the values alone, as float32.
void widen(const void *values, int64_t dtype, int64_t count, double offset, float *out) {
    with_dtype(dtype, [&](auto of) {
        typedef decltype(of) T;
        auto row = static_cast<const typename T::Memory *>(values);
        by_vectors(0, count, [&](int64_t start, int vector, auto part) {
            Floats wide = load<T>(row, start, vector, part);
            // an offset of zero would change the sign of a zero
            store<Float32>(offset ? wide + float(offset) : wide, out, start, vector, part);
        });
    });
}

template <class X, class Residual, class Out>
Add add_of(bool stored, bool subtract_mean) {
    if constexpr (same<Out, BFloat16> || same<Out, Float16>) {
        if (stored) {
            return subtract_mean ? add<X, Residual, Out, true, true> : add<X, Residual, Out, true, false>;
        }
    }
    return subtract_mean ? add<X, Residual, Out, false, true> : add<X, Residual, Out, false, false>;
}

// Null for a combination of dtypes that is rare: it is computed from x and residual in float32.
Add add_for(const Forward &call) {
    bool stored = call.rounding != SUM, mean = call.subtract_mean;
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

ALWAYS float reciprocal_root(double sum_of_squares, int64_t hidden, double eps) {
    return 1.0f / __builtin_sqrtf(float(sum_of_squares / double(hidden)) + float(eps));
}

// An array's rows in float32, exactly: those of dtypes that `add` does not know side by side.
const void *widened(const void *row, int64_t dtype, int64_t hidden, float *wide) {
    widen(row, dtype, hidden, 0.0, wide);
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
    const bool rare = !add_row;
    if (rare) {
        call.x_dtype = call.residual_dtype = FLOAT32;
        add_row = add_for(call);
    }
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
            mean = float(total / double(hidden));
            total = sum_of_squares<Float32>(h, hidden, mean);
        }
        float rstd = reciprocal_root(total, hidden, call.eps);
        normalise_row(h, weight, bias, y, hidden, mean, rstd);
        if (statistics_of_rounded) {
            bool brain = call.residual_out_dtype == BFLOAT16;
            mean = call.subtract_mean ? float((brain ? sum<BFloat16> : sum<Float16>)(out, hidden) / double(hidden)) : 0.0f;
            total = (brain ? sum_of_squares<BFloat16> : sum_of_squares<Float16>)(out, hidden, mean);
            rstd = reciprocal_root(total, hidden, call.eps);
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
