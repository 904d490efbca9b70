// Numbers of several features, or tokens, side by side in one vector: squares of numbers turned, and sums over lanes.
#pragma once

#include "vector.hpp"

namespace korder::KORDER_ISA {

template <int Width>
struct Interleave;

template <>
struct Interleave<2> {
    template <class V>
    static KORDER_INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 2); }
    template <class V>
    static KORDER_INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 1, 3); }
};

template <>
struct Interleave<4> {
    template <class V>
    static KORDER_INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
    template <class V>
    static KORDER_INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};

template <>
struct Interleave<8> {
    template <class V>
    static KORDER_INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
    template <class V>
    static KORDER_INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};

template <>
struct Interleave<16> {
    template <class V>
    static KORDER_INLINE V low(V a, V b) {
        return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    }
    template <class V>
    static KORDER_INLINE V high(V a, V b) {
        return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
};

// Turns rows into columns: after each round neighbours were half a square apart before.
template <class Real>
KORDER_INLINE void transpose(vec<Real>* rows) {
    constexpr int width = Vector<Real>::width;
#pragma GCC unroll 4
    for (int step = 1; step < width; step *= 2) {
        vec<Real> next[width];
#pragma GCC unroll 8
        for (int i = 0; i < width / 2; ++i) {
            next[2 * i] = Interleave<width>::low(rows[i], rows[i + width / 2]);
            next[2 * i + 1] = Interleave<width>::high(rows[i], rows[i + width / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) rows[i] = next[i];
    }
}

// Square by square: to[j * to_pitch + i] = from[i * from_pitch + j] for i < width and j < length, whole vectors of them.
template <class Real>
KORDER_INLINE void transpose_columns(const Real* from, std::int64_t from_pitch, std::int64_t length, Real* to,
                                     std::int64_t to_pitch) {
    constexpr int width = Vector<Real>::width;
    for (std::int64_t j = 0; j < length; j += width) {
        vec<Real> rows[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) rows[i] = load(from + i * from_pitch + j);
        transpose<Real>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store(to + (j + i) * to_pitch, rows[i]);
    }
}

// The sums over the lanes of `width` vectors that follow one another.
template <class Real>
KORDER_INLINE vec<Real> sums_over_lanes(const Real* from) {
    constexpr int width = Vector<Real>::width;
    vec<Real> rows[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = load(from + i * width);
    transpose<Real>(rows);
#pragma GCC unroll 4
    for (int step = width / 2; step; step /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i) rows[i] += rows[i + step];
    return rows[0];
}

}  // namespace korder::KORDER_ISA
