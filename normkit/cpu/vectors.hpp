// SPDX-License-Identifier: Apache-2.0
// Pairs of vectors, from and to memory of every format.
#pragma once
#include "formats.hpp"

namespace {

// bfloat16 of which a pair of vectors has every other element each: fewer instructions from and to memory. All rows that are
// combined must then be in that order, which is that of the memory for none but these.
struct Split {
    typedef uint16_t Memory;
};
// A row of float32 of our own, in the order of the rows that it is combined with, up to a whole number of blocks.
struct Wide {
    typedef float Memory;
};
// An array that is not there.
struct Nothing {
    typedef char Memory;
};

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

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// A whole block, one to be written past the caches, or the first `count` elements of one.
struct Streamed {};
struct Whole {
    template <bool STREAMS>
    ALWAYS Choice<STREAMS, Streamed, Whole> past_caches() const {
        return {};
    }
};
struct Part {
    int64_t count;
    template <bool STREAMS>
    ALWAYS Part past_caches() const {
        return *this;
    }
    // Of `length` elements after the first `start` of the block, those that the row has.
    ALWAYS int64_t elements(int64_t start, int64_t length) const {
        int64_t left = count - start;
        return left < 0 ? 0 : left < length ? left : length;
    }
};

// Two vectors: 2 LANES elements, in the order of the memory or (see Split) every other one.
struct Pair {
    Floats first, second;
};
constexpr int PAIRS = VECTORS / 2;
constexpr int64_t IN_PAIR = 2 * LANES;

template <class Function>
ALWAYS Pair each(Pair pair, Function function) {
    return {function(pair.first), function(pair.second)};
}
template <class Function>
ALWAYS Pair each(Pair a, Pair b, Function function) {
    return {function(a.first, b.first), function(a.second, b.second)};
}
ALWAYS Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
ALWAYS Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
ALWAYS Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
ALWAYS Pair operator*(Pair a, float b) { return {a.first * b, a.second * b}; }
ALWAYS Pair operator-(Pair a, float b) { return {a.first - b, a.second - b}; }

template <class Packed, class Memory, class At>
ALWAYS Packed read(const Memory *row, int64_t start, int64_t length, At at) {
    Packed packed{};
    if constexpr (same<At, Whole>) {
        std::memcpy(&packed, row + start, sizeof packed);
    } else if (int64_t count = at.elements(start, length)) {
        std::memcpy(&packed, row + start, count * sizeof *row);
    }
    return packed;
}

// Memory past the caches is aligned to STREAMED_AT bytes, and `end_of_streams` must follow.
template <class Packed>
ALWAYS void stream(Packed packed, void *memory) {
#if defined(__SSE2__)
    if constexpr (sizeof packed % STREAMED_AT == 0) {
        __m128i parts[sizeof packed / STREAMED_AT];
        std::memcpy(parts, &packed, sizeof packed);
#pragma GCC unroll 4
        for (size_t part = 0; part < sizeof packed / STREAMED_AT; ++part) {
            _mm_stream_si128(static_cast<__m128i *>(memory) + part, parts[part]);
        }
        return;
    }
#endif
    std::memcpy(memory, &packed, sizeof packed);
}

// What was streamed is seen by other threads only then.
ALWAYS void end_of_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

template <class Packed, class Memory, class At>
ALWAYS void write(Packed packed, Memory *row, int64_t start, int64_t length, At at) {
    if constexpr (same<At, Streamed>) {
        stream(packed, row + start);
    } else if constexpr (same<At, Whole>) {
        std::memcpy(row + start, &packed, sizeof packed);
    } else if (int64_t count = at.elements(start, length)) {
        std::memcpy(row + start, &packed, count * sizeof *row);
    }
}

constexpr uint32_t UPPER = 0xffff0000;

// The upper half is the bfloat16. What is rounded is the result of arithmetic on numbers whose NaNs have nothing in the lower half
// (see `without_payload`), so that it is the same for a NaN.
ALWAYS Floats rounded_upper(Floats values) {
    Words bits = bits_as<Words>(values);
    return bits_as<Floats>(bits + 0x7fff + ((bits >> 16) & 1));
}

ALWAYS Floats without_payload(Floats values) {
    Words bits = bits_as<Words>(values), is_nan = bits_as<Words>(values != values);
    return bits_as<Floats>(choose(is_nan, (bits & UPPER) | 0x00400000, bits));
}

// The lower halves of one and the upper halves of the other.
ALWAYS Words halves_of(Words lower, Words upper) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return bits_as<Words>(_mm256_blend_epi16(bits_as<__m256i>(lower), bits_as<__m256i>(upper), 0xaa));
#else
    return lower | (upper & UPPER);
#endif
}

template <class T, class At>
ALWAYS Pair load(const typename T::Memory *block, int pair, At at) {
    int64_t start = pair * IN_PAIR;
    if constexpr (same<T, Split>) {
        Words both = read<Words>(block, start, IN_PAIR, at);
        return {bits_as<Floats>(both << 16), bits_as<Floats>(both & UPPER)};
    } else if constexpr (same<T, Wide>) {
        return {read<Floats>(block, start, LANES, Whole{}), read<Floats>(block, start + LANES, LANES, Whole{})};
    } else {
        typedef typename T::Packed Packed;
        return {T::widen(read<Packed>(block, start, LANES, at)), T::widen(read<Packed>(block, start + LANES, LANES, at))};
    }
}

// Write values rounded to T, and return what was written.
template <class T, class At>
ALWAYS Pair store(Pair values, typename T::Memory *block, int pair, At at) {
    int64_t start = pair * IN_PAIR;
    if constexpr (same<T, Split>) {
        Words even = bits_as<Words>(rounded_upper(values.first)), odd = bits_as<Words>(rounded_upper(values.second));
        write(halves_of(even >> 16, odd), block, start, IN_PAIR, at);
        return {bits_as<Floats>(even & UPPER), bits_as<Floats>(odd & UPPER)};
    } else if constexpr (same<T, Wide>) {
        write(values.first, block, start, LANES, Whole{});
        write(values.second, block, start + LANES, LANES, Whole{});
        return values;
    } else {
        auto first = T::narrow(values.first), second = T::narrow(values.second);
        write(first, block, start, LANES, at);
        write(second, block, start + LANES, LANES, at);
        return {T::widen(first), T::widen(second)};
    }
}

template <class T>
ALWAYS Pair rounded(Pair values) {
    if constexpr (same<T, Split>) {
        return each(values, [](Floats v) { return bits_as<Floats>(bits_as<Words>(rounded_upper(v)) & UPPER); });
    } else {
        return each(values, [](Floats v) { return T::widen(T::narrow(v)); });
    }
}

// Where in its block the element is that a lane of a pair has.
template <bool SPLIT>
constexpr int64_t place(int pair, int second, int lane) {
    return pair * IN_PAIR + (SPLIT ? 2 * lane + second : second * LANES + lane);
}

// Zero where the row has no elements.
template <bool SPLIT, class At>
ALWAYS Pair kept(Pair values, int pair, At at) {
    if constexpr (same<At, Part>) {
        for (int lane = 0; lane < LANES; ++lane) {
            values.first[lane] = place<SPLIT>(pair, 0, lane) < at.count ? values.first[lane] : 0.0f;
            values.second[lane] = place<SPLIT>(pair, 1, lane) < at.count ? values.second[lane] : 0.0f;
        }
    }
    return values;
}

}  // namespace
