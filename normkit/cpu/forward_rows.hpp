// SPDX-License-Identifier: Apache-2.0
// The forward pass of whole rows, short ones several at a time, and of a slice of a row that several threads share.
#pragma once
#include "row.hpp"

namespace {

// The functions that the dtypes and options of a call need.
class ForwardRows {
  public:
    ForwardRows(const Forward &given, const Scratch &given_scratch)
        : call(given), scratch(given_scratch), split(is_split(given)),
          weight(given_scratch.weight ? given_scratch.weight : given.weight),
          bias(given_scratch.bias ? given_scratch.bias : given.bias),
          // statistics of the rounded residual_out are computed from what was written
          streams_out(given_scratch.streams && !statistics_of_rounded(given)),
          add_rows(streams_out ? add_for<true>(given) : add_for<false>(given)),
          normalise_rows(given_scratch.streams ? normaliser<true>() : normaliser<false>()) {
        if (!add_rows) {
            Forward wide = given;
            wide.x_dtype = wide.residual_dtype = FLOAT32;
            add_rows = streams_out ? add_for<true>(wide) : add_for<false>(wide);
            widens = true;
        }
    }

    // Set up rows that begin with `row`, at most up to `last`, in the slice of it from `first` on.
    void begin(Batch &batch, int64_t row, int64_t last, const Slice &slice, int64_t worker) const {
        const bool nested = call.inner_rows != 1;
        int64_t count = widens ? 1 : scratch.batch;
        count = count < last - row ? count : last - row;
        if (nested) {
            int64_t rest = call.inner_rows - row % call.inner_rows;
            count = count < rest ? count : rest;
        }
        auto lines = [&](const void *array, Rows rows, int64_t dtype) {
            auto own = from(row_of(array, rows, row, call.inner_rows, dtype), slice.first, dtype);
            return Lines{own, !array ? 0 : nested ? rows.inner : rows.outer};
        };
        batch.count = count;
        batch.after = last - row - count;
        batch.length = slice.last - slice.first;
        batch.x = lines(call.x, call.x_rows, call.x_dtype);
        batch.residual = lines(call.residual, call.residual_rows, call.residual_dtype);
        batch.residual_out = lines(call.residual_out, call.residual_out_rows, call.residual_out_dtype);
        batch.y = lines(call.y, call.y_rows, call.y_dtype);
        batch.wide = Lines{scratch.row(worker, 0) + slice.first, scratch.padded};
        bool x_is_h = !call.residual_out && call.x_dtype == FLOAT32;
        bool out_is_h = call.residual_out && call.residual_out_dtype == FLOAT32 && !streams_out;
        batch.h = x_is_h ? batch.x : out_is_h ? batch.residual_out : batch.wide;
        batch.weight = from(weight, slice.first, scratch.weight ? FLOAT32 : call.weight_dtype);
        batch.bias = from(bias, slice.first, scratch.bias ? FLOAT32 : call.bias_dtype);
        for (Statistics &statistics : batch.statistics) {
            statistics = slice.statistics;
        }
    }

    // The sums of h, or without a mean of its squares; `spare` are two rows of memory.
    void add(Batch &batch, float *spare) const {
        if (widens) {
            batch.x.first = widened(batch.x.first, call.x_dtype, batch.length, spare);
            batch.residual.first = widened(batch.residual.first, call.residual_dtype, batch.length, spare + scratch.padded);
        }
        add_rows(batch);
    }

    void squares(Batch &batch) const { split ? sum_of_squares<Wide, true>(batch) : sum_of_squares<Float32, false>(batch); }

    void normalise(Batch &batch) const { normalise_rows(batch); }

    // The same sums of residual_out as it was rounded.
    void rounded_sum(Batch &batch) const {
        batch.h = batch.residual_out;
        call.residual_out_dtype == BFLOAT16 ? sum<BFloat16>(batch) : sum<Float16>(batch);
    }

    void rounded_squares(Batch &batch) const {
        batch.h = batch.residual_out;
        call.residual_out_dtype == BFLOAT16 ? sum_of_squares<BFloat16, false>(batch) : sum_of_squares<Float16, false>(batch);
    }

  private:
    template <bool STREAMS>
    Compute normaliser() const {
        return normalise_for<STREAMS>(call, scratch.weight || scratch.bias, weight, bias);
    }

    const Forward &call;
    const Scratch &scratch;
    const bool split;
    const void *const weight, *const bias;
    const bool streams_out;
    Compute add_rows;
    const Compute normalise_rows;
    bool widens = false;
};

void set_mean(Batch &batch, const Forward &call) {
    for (int64_t row = 0; row < batch.count; ++row) {
        batch.statistics[row].mean = mean_of(batch.totals[row], call);
    }
}

void set_rstd(Batch &batch, const Forward &call) {
    for (int64_t row = 0; row < batch.count; ++row) {
        batch.statistics[row].rstd = rstd_of(batch.totals[row], call);
    }
}

void forward_rows(const Forward &call, const Scratch &scratch, int64_t first, int64_t last, int64_t worker) {
    const ForwardRows rows(call, scratch);
    const Slice whole{Pass::ADD, first, 0, call.hidden, {}};
    Batch batch;
    for (; first < last; first += batch.count) {
        rows.begin(batch, first, last, whole, worker);
        rows.add(batch, scratch.row(worker, scratch.batch));
        if (call.subtract_mean) {
            set_mean(batch, call);
            rows.squares(batch);
        }
        set_rstd(batch, call);
        rows.normalise(batch);
        if (statistics_of_rounded(call)) {
            if (call.subtract_mean) {
                rows.rounded_sum(batch);
                set_mean(batch, call);
            }
            rows.rounded_squares(batch);
            set_rstd(batch, call);
        }
        for (int64_t row = 0; row < batch.count; ++row) {
            keep(call, first + row, batch.statistics[row]);
        }
    }
    if (scratch.streams) {
        end_of_streams();
    }
}

double forward_slice(const Forward &call, const Scratch &scratch, const Slice &slice) {
    const ForwardRows rows(call, scratch);
    Batch batch;
    rows.begin(batch, slice.row, slice.row + 1, slice, 0);
    switch (slice.pass) {
    case Pass::ADD:
        rows.add(batch, scratch.row(0, 1) + slice.first);
        break;
    case Pass::SQUARES:
        rows.squares(batch);
        break;
    case Pass::NORMALISE:
        rows.normalise(batch);
        break;
    case Pass::ROUNDED_SUM:
        rows.rounded_sum(batch);
        break;
    case Pass::ROUNDED_SQUARES:
        rows.rounded_squares(batch);
        break;
    }
    return batch.totals[0];
}

}  // namespace
