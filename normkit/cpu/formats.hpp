// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as this build may use, and what float32, bfloat16 and float16 are in them, rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
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
constexpr int64_t CACHE_LINE = 64;

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

}  // namespace
