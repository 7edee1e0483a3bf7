// SPDX-License-Identifier: Apache-2.0
// The forward pass of whole rows, short ones several at a time, and of a slice of a row that several threads share.
#pragma once
#include "row.hpp"

namespace {

// One row of a call, from an element on.
struct ForwardRow {
    const void *x, *residual, *weight, *bias;
    void *residual_out, *y;
    float *wide;
    const float *h;
    int64_t length;
};

// The functions that the dtypes and options of a call need.
class ForwardRows {
  public:
    ForwardRows(const Forward &given, const Scratch &given_scratch)
        : call(given), scratch(given_scratch), split(is_split(given)),
          weight(given_scratch.weight ? given_scratch.weight : given.weight),
          bias(given_scratch.bias ? given_scratch.bias : given.bias), add_row(add_for(given)),
          normalise_row(normalise_for(given, given_scratch.weight || given_scratch.bias, weight, bias)) {
        if (!add_row) {
            Forward wide = given;
            wide.x_dtype = wide.residual_dtype = FLOAT32;
            add_row = add_for(wide);
            widens = true;
        }
    }

    ForwardRow row(int64_t index, int64_t first, int64_t last, float *wide) const {
        auto at = [&](auto array, Rows rows, int64_t dtype) {
            return from(row_of(array, rows, index, call.inner_rows, dtype), first, dtype);
        };
        ForwardRow own{};
        own.x = at(call.x, call.x_rows, call.x_dtype);
        own.residual = at(call.residual, call.residual_rows, call.residual_dtype);
        own.residual_out = at(call.residual_out, call.residual_out_rows, call.residual_out_dtype);
        own.y = at(call.y, call.y_rows, call.y_dtype);
        own.weight = from(weight, first, scratch.weight ? FLOAT32 : call.weight_dtype);
        own.bias = from(bias, first, scratch.bias ? FLOAT32 : call.bias_dtype);
        own.wide = wide + first;
        bool x_is_h = !call.residual_out && call.x_dtype == FLOAT32;
        bool out_is_h = call.residual_out && call.residual_out_dtype == FLOAT32;
        own.h = x_is_h ? static_cast<const float *>(own.x) : out_is_h ? static_cast<const float *>(own.residual_out) : own.wide;
        own.length = last - first;
        return own;
    }

    // The sum of h, or without a mean of its squares; `spare` are two rows of memory.
    double add(const ForwardRow &row, float *spare) const {
        auto x = row.x, residual = row.residual;
        if (widens) {
            x = widened(x, call.x_dtype, row.length, spare);
            residual = widened(residual, call.residual_dtype, row.length, spare + scratch.padded);
        }
        return add_row(x, residual, row.residual_out, row.wide, row.length);
    }

    double squares(const ForwardRow &row, float mean) const {
        return split ? sum_of_squares<Wide, true>(row.h, row.length, mean) : sum_of_squares<Float32, false>(row.h, row.length, mean);
    }

    void normalise(const ForwardRow &row, Statistics statistics, const Ahead &ahead) const {
        normalise_row(row.h, row.weight, row.bias, row.y, row.length, statistics.mean, statistics.rstd, ahead);
    }

    // The same sums of residual_out as it was rounded.
    double rounded_sum(const ForwardRow &row) const {
        return (call.residual_out_dtype == BFLOAT16 ? sum<BFloat16> : sum<Float16>)(row.residual_out, row.length);
    }

    double rounded_squares(const ForwardRow &row, float mean) const {
        bool brain = call.residual_out_dtype == BFLOAT16;
        return (brain ? sum_of_squares<BFloat16, false> : sum_of_squares<Float16, false>)(row.residual_out, row.length, mean);
    }

  private:
    const Forward &call;
    const Scratch &scratch;
    const bool split;
    const void *const weight, *const bias;
    Add add_row;
    const Normalise normalise_row;
    bool widens = false;
};

Statistics rounded_statistics(const ForwardRows &rows, const ForwardRow &row, const Forward &call) {
    float mean = call.subtract_mean ? mean_of(rows.rounded_sum(row), call) : 0.0f;
    return {mean, rstd_of(rows.rounded_squares(row, mean), call)};
}

void forward_rows(const Forward &call, const Scratch &scratch, int64_t first, int64_t last, int64_t worker) {
    const ForwardRows rows(call, scratch);
    float *spare = scratch.row(worker, scratch.batch);
    for (; first < last; first += scratch.batch) {
        const int64_t count = first + scratch.batch < last ? scratch.batch : last - first;
        // step by step for all of them, because the steps between the passes over a row are a long wait for a short row
        ForwardRow batch[MOST_IN_BATCH];
        double totals[MOST_IN_BATCH];
        Statistics statistics[MOST_IN_BATCH];
        for (int64_t index = 0; index < count; ++index) {
            batch[index] = rows.row(first + index, 0, call.hidden, scratch.row(worker, index));
            totals[index] = rows.add(batch[index], spare);
        }
        for (int64_t index = 0; index < count; ++index) {
            statistics[index].mean = call.subtract_mean ? mean_of(totals[index], call) : 0.0f;
            if (call.subtract_mean) {
                totals[index] = rows.squares(batch[index], statistics[index].mean);
            }
        }
        for (int64_t index = 0; index < count; ++index) {
            statistics[index].rstd = rstd_of(totals[index], call);
        }
        for (int64_t index = 0; index < count; ++index) {
            int64_t after = first + scratch.batch + index < last ? first + scratch.batch + index : last - 1;
            const void *x = row_of(call.x, call.x_rows, after, call.inner_rows, call.x_dtype);
            const void *residual = row_of(call.residual, call.residual_rows, after, call.inner_rows, call.residual_dtype);
            rows.normalise(batch[index], statistics[index], Ahead{x, residual ? residual : x});
        }
        for (int64_t index = 0; index < count && call.rstd; ++index) {
            bool rounded = statistics_of_rounded(call);
            keep(call, first + index, rounded ? rounded_statistics(rows, batch[index], call) : statistics[index]);
        }
    }
}

double forward_slice(const Forward &call, const Scratch &scratch, const Slice &slice) {
    const ForwardRows rows(call, scratch);
    ForwardRow row = rows.row(slice.row, slice.first, slice.last, scratch.row(0, 0));
    switch (slice.pass) {
    case Pass::ADD:
        return rows.add(row, scratch.row(0, 1) + slice.first);
    case Pass::SQUARES:
        return rows.squares(row, slice.statistics.mean);
    case Pass::NORMALISE:
        rows.normalise(row, slice.statistics, Ahead{row.x, row.x});
        return 0.0;
    case Pass::ROUNDED_SUM:
        return rows.rounded_sum(row);
    case Pass::ROUNDED_SQUARES:
        return rows.rounded_squares(row, slice.statistics.mean);
    }
    return 0.0;
}

}  // namespace
