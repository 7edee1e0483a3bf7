// SPDX-License-Identifier: Apache-2.0
// Loops over a row, and sums over it in one order on every processor.
#pragma once
#include "vectors.hpp"

#define INLINED __attribute__((always_inline))

namespace {

// body(start, pair, at) for every pair of vectors of the whole blocks from first to last; the result is where these end.
template <class Body>
ALWAYS int64_t by_whole_blocks(int64_t first, int64_t last, Body body) {
    int64_t start = first;
    for (; start + BLOCK <= last; start += BLOCK) {
#pragma GCC unroll 8
        for (int pair = 0; pair < PAIRS; ++pair) {
            body(start, pair, Whole{});
        }
    }
    return start;
}

// The end of a row: not unrolled, as it is there once.
template <class Body>
ALWAYS void by_part(int64_t start, int64_t last, Body body) {
#pragma GCC unroll 1
    for (int pair = 0; pair < PAIRS; ++pair) {
        body(start, pair, Part{last - start});
    }
}

template <class Body>
ALWAYS void by_pairs(int64_t hidden, Body body) {
    int64_t start = by_whole_blocks(0, hidden, body);
    if (start < hidden) {
        by_part(start, hidden, body);
    }
}

// The same from the end: of a row that was just read from its start, the end is still in the first cache.
template <class Body>
ALWAYS void by_pairs_from_end(int64_t hidden, Body body) {
    int64_t start = hidden / BLOCK * BLOCK;
    if (start < hidden) {
        by_part(start, hidden, body);
    }
    while (start > 0) {
        start -= BLOCK;
#pragma GCC unroll 8
        for (int pair = 0; pair < PAIRS; ++pair) {
            body(start, pair, Whole{});
        }
    }
}

// The sum of a vector's lanes, the upper half folded onto the lower, down to one.
ALWAYS float across(Floats lanes) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    auto all = bits_as<__m512>(lanes);
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
    auto eight = bits_as<__m256>(lanes);
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
#endif
}

// BLOCK sums side by side: that of each place within a block.
struct Sums {
    Pair terms[PAIRS] = {};

    // Fold the upper half onto the lower, down to one.
    template <bool SPLIT>
    ALWAYS float folded() const {
        Pair all = terms[0];
        if constexpr (PAIRS == 4) {
            all = (terms[0] + terms[2]) + (terms[1] + terms[3]);
        } else if constexpr (PAIRS == 2) {
            all = terms[0] + terms[1];
        }
        return SPLIT ? across(all.first) + across(all.second) : across(all.first + all.second);
    }
};

// Totals over a row of COUNT sums to which body(start, pair, at, sums) adds.
template <bool SPLIT, int COUNT, class Body>
ALWAYS void by_sums(int64_t hidden, double (&totals)[COUNT], Body body) {
    for (double &total : totals) {
        total = 0.0;
    }
    for (int64_t first = 0; first < hidden; first += SUM_LENGTH) {
        int64_t last = first + SUM_LENGTH < hidden ? first + SUM_LENGTH : hidden;
        Sums sums[COUNT];
        int64_t rest = by_whole_blocks(first, last, [&](int64_t start, int pair, Whole at) INLINED { body(start, pair, at, sums); });
        if (rest < last) {
            // in memory of their own, so that the sums above can stay in registers
            Sums ends[COUNT];
            by_part(rest, last, [&](int64_t start, int pair, Part at) INLINED { body(start, pair, at, ends); });
            for (int index = 0; index < COUNT; ++index) {
                for (int pair = 0; pair < PAIRS; ++pair) {
                    sums[index].terms[pair] = sums[index].terms[pair] + ends[index].terms[pair];
                }
            }
        }
        for (int index = 0; index < COUNT; ++index) {
            totals[index] += sums[index].template folded<SPLIT>();
        }
    }
}

}  // namespace
