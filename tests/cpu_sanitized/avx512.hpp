// SPDX-License-Identifier: Apache-2.0
// Included ahead of rows.cpp, this compiles the AVX-512 level for processors that have AVX2: the compiler makes two vectors of each,
// and the intrinsics that the level calls by name are these.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1

namespace emulated {

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class Half, class All>
inline Half half(All all, int index) {
    Half part;
    std::memcpy(&part, reinterpret_cast<const char *>(&all) + index * sizeof part, sizeof part);
    return part;
}

template <class All, class Half>
inline All both(Half lower, Half upper) {
    All all;
    std::memcpy(&all, &lower, sizeof lower);
    std::memcpy(reinterpret_cast<char *>(&all) + sizeof lower, &upper, sizeof upper);
    return all;
}

}  // namespace emulated

#define _mm512_castps512_ps256(all) emulated::half<__m256>(all, 0)
#define _mm512_extractf32x8_ps(all, index) emulated::half<__m256>(all, index)
#define _mm512_cvtepi32_epi16(all) ((__m256i)__builtin_convertvector((emulated::Words)(all), emulated::Halves))
#define _mm512_cvtepu16_epi32(half) ((__m512i)__builtin_convertvector((emulated::Halves)(half), emulated::Words))
#define _mm512_cvtps_ph(all, rounding)                                                       \
    emulated::both<__m256i>(_mm256_cvtps_ph(emulated::half<__m256>(all, 0), (rounding) & 7), \
                            _mm256_cvtps_ph(emulated::half<__m256>(all, 1), (rounding) & 7))
#define _mm512_cvtph_ps(half_words)                                                    \
    emulated::both<__m512>(_mm256_cvtph_ps(emulated::half<__m128i>(half_words, 0)), \
                           _mm256_cvtph_ps(emulated::half<__m128i>(half_words, 1)))
