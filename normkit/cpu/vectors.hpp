// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as this build may use, and float32, bfloat16 and float16 from and to memory, rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "arguments.hpp"

#define ALWAYS inline __attribute__((always_inline))

// All is local to the file that includes this: it is compiled several times for different processors.
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int VECTORS = BLOCK / LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class To, class From>
ALWAYS To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

ALWAYS Words choose(Words mask, Words yes, Words no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return bits_as<Words>(_mm256_blendv_epi8(bits_as<__m256i>(no), bits_as<__m256i>(yes), bits_as<__m256i>(mask)));
#else
    return (mask & yes) | (~mask & no);
#endif
}

// The low half of every word; the high half is zero.
ALWAYS Halves narrow_words(Words words) {
#if defined(__AVX512F__)
    return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(words)));
#elif defined(__AVX2__)
    __m256i all = bits_as<__m256i>(words);
    return bits_as<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    return __builtin_convertvector(words, Halves);
#endif
}

ALWAYS Words widen_halves(Halves halves) {
#if defined(__AVX512F__)
    return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(halves)));
#elif defined(__AVX2__)
    return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(halves)));
#else
    return __builtin_convertvector(halves, Words);
#endif
}

struct Float32 {
    typedef float Memory;
    typedef Floats Packed;
    static ALWAYS Packed narrow(Floats values) { return values; }
    static ALWAYS Floats widen(Packed packed) { return packed; }
};

struct BFloat16 {
    typedef uint16_t Memory;
    typedef Halves Packed;
    static ALWAYS Packed narrow(Floats values) {
        Words bits = bits_as<Words>(values);
        Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
        Words is_nan = bits_as<Words>(values != values);
        return narrow_words(choose(is_nan, bits | 0x00400000, rounded) >> 16);
    }
    static ALWAYS Floats widen(Packed packed) { return bits_as<Floats>(widen_halves(packed) << 16); }
};

struct Float16 {
    typedef uint16_t Memory;
    typedef Halves Packed;
#if defined(__AVX512F__)
    static ALWAYS Packed narrow(Floats values) { return bits_as<Packed>(_mm512_cvtps_ph(bits_as<__m512>(values), 8)); }
    static ALWAYS Floats widen(Packed packed) { return bits_as<Floats>(_mm512_cvtph_ps(bits_as<__m256i>(packed))); }
#elif defined(__F16C__) && defined(__AVX2__)
    static ALWAYS Packed narrow(Floats values) { return bits_as<Packed>(_mm256_cvtps_ph(bits_as<__m256>(values), 0)); }
    static ALWAYS Floats widen(Packed packed) { return bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(packed))); }
#else
    static ALWAYS Packed narrow(Floats values) {
        Words bits = bits_as<Words>(values), sign = bits & 0x80000000;
        bits ^= sign;
        // for results below the normal numbers the addition of 0.5 rounds the mantissa at the right bit
        Words small = bits_as<Words>(bits_as<Floats>(bits) + 0.5f) - 0x3f000000;
        Words normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
        Words nan = ((bits >> 13) & 0x3ff) | 0x7e00;
        Words large = choose(bits_as<Words>(bits > 0x7f800000), nan, Words{} + 0x7c00);
        Words finite = choose(bits_as<Words>(bits < 0x38800000), small, normal);
        return narrow_words(choose(bits_as<Words>(bits >= 0x47800000), large, finite) | (sign >> 16));
    }
    static ALWAYS Floats widen(Packed packed) {
        Words half = widen_halves(packed), sign = (half & 0x8000) << 16, rest = half & 0x7fff;
        Words normal = (rest << 13) + 0x38000000;
        Words large = (rest << 13) | 0x7f800000 | bits_as<Words>((rest > 0x7c00) & 0x400000);
        // the exponent of a subnormal number is that of 2^-14, without the leading one
        Words small = bits_as<Words>(bits_as<Floats>((rest << 13) + 0x38800000) - 0x1p-14f);
        Words finite = choose(bits_as<Words>(rest < 0x0400), small, normal);
        return bits_as<Floats>(choose(bits_as<Words>(rest >= 0x7c00), large, finite) | sign);
    }
#endif
};

// An array that is not there.
struct Nothing {
    typedef char Memory;
};

// A whole block, or the first `count` elements of one.
struct Whole {
    ALWAYS int64_t lanes(int) const { return LANES; }
};
struct Part {
    int64_t count;
    ALWAYS int64_t lanes(int vector) const {
        int64_t left = count - int64_t(vector) * LANES;
        return left < 0 ? 0 : left < LANES ? left : LANES;
    }
};

template <class T>
ALWAYS Floats load(const typename T::Memory *row, int64_t start, int vector, Whole) {
    typename T::Packed packed;
    std::memcpy(&packed, row + start + vector * LANES, sizeof packed);
    return T::widen(packed);
}
template <class T>
ALWAYS Floats load(const typename T::Memory *row, int64_t start, int vector, Part part) {
    typename T::Packed packed{};
    if (part.lanes(vector)) {
        std::memcpy(&packed, row + start + vector * LANES, part.lanes(vector) * sizeof *row);
    }
    return T::widen(packed);
}
template <class T>
ALWAYS void store(typename T::Packed packed, typename T::Memory *row, int64_t start, int vector, Whole) {
    std::memcpy(row + start + vector * LANES, &packed, sizeof packed);
}
template <class T>
ALWAYS void store(typename T::Packed packed, typename T::Memory *row, int64_t start, int vector, Part part) {
    if (part.lanes(vector)) {
        std::memcpy(row + start + vector * LANES, &packed, part.lanes(vector) * sizeof *row);
    }
}

// Zero where the row has no elements.
ALWAYS Floats kept(Floats values, int, Whole) { return values; }
ALWAYS Floats kept(Floats values, int vector, Part part) {
    for (int lane = 0; lane < LANES; ++lane) {
        values[lane] = lane < part.lanes(vector) ? values[lane] : 0.0f;
    }
    return values;
}

template <class Body>
ALWAYS int64_t by_whole_blocks(int64_t first, int64_t last, Body body) {
    int64_t start = first;
    for (; start + BLOCK <= last; start += BLOCK) {
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; ++vector) {
            body(start, vector, Whole{});
        }
    }
    return start;
}

// The end of a row: not unrolled, as it is there once.
template <class Body>
ALWAYS void by_part(int64_t start, int64_t last, Body body) {
#pragma GCC unroll 1
    for (int vector = 0; vector < VECTORS; ++vector) {
        body(start, vector, Part{last - start});
    }
}

template <class Body>
ALWAYS void by_vectors(int64_t first, int64_t last, Body body) {
    int64_t start = by_whole_blocks(first, last, body);
    if (start < last) {
        by_part(start, last, body);
    }
}

struct Sums {
    Floats terms[VECTORS] = {};

    // Fold the upper half onto the lower, down to one: the same order for vectors of any width.
    ALWAYS float folded() const {
        float sums[BLOCK];
        std::memcpy(sums, terms, sizeof sums);
        for (int width = BLOCK / 2; width; width /= 2) {
            for (int index = 0; index < width; ++index) {
                sums[index] += sums[index + width];
            }
        }
        return sums[0];
    }
};

// A longer row is summed in parts of this length, and these in float64.
constexpr int64_t SUM_LENGTH = 8192;

// Totals over a row of COUNT sums to which body(start, vector, part, sums) adds.
template <int COUNT, class Body>
ALWAYS void by_sums(int64_t hidden, double (&totals)[COUNT], Body body) {
    for (double &total : totals) {
        total = 0.0;
    }
    for (int64_t first = 0; first < hidden; first += SUM_LENGTH) {
        int64_t last = first + SUM_LENGTH < hidden ? first + SUM_LENGTH : hidden;
        Sums sums[COUNT];
        auto whole = [&](int64_t start, int vector, Whole all) __attribute__((always_inline)) { body(start, vector, all, sums); };
        int64_t rest = by_whole_blocks(first, last, whole);
        if (rest < last) {
            // in memory of their own, so that the sums above can stay in registers
            Sums ends[COUNT];
            by_part(rest, last, [&](int64_t start, int vector, Part part) __attribute__((always_inline)) {
                body(start, vector, part, ends);
            });
            for (int index = 0; index < COUNT; ++index) {
                for (int vector = 0; vector < VECTORS; ++vector) {
                    sums[index].terms[vector] += ends[index].terms[vector];
                }
            }
        }
        for (int index = 0; index < COUNT; ++index) {
            totals[index] += sums[index].folded();
        }
    }
}

}  // namespace
