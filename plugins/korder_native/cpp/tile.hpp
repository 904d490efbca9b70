// The steps of one tile: scores, what closes some of them, and the weighted values.
#pragma once

#include "exponential.hpp"
#include "pack.hpp"
#include "product.hpp"
#include "sight.hpp"

namespace korder::KORDER_ISA {

// scores[r][j] for the panels [first, last) of packed keys, `first` and `last` in keys.
template <class Real, int Rows>
__attribute__((noinline)) void tile_scores(const Real* folded, const Real* panels, std::int64_t width,
                                           std::int64_t first, std::int64_t last, Real* scores) {
    constexpr int panel = Sizes<Real>::panel, lanes = Sizes<Real>::lanes, pitch = Sizes<Real>::pitch;
    for (std::int64_t p = first; p < last; p += panel) {
        Tile<Real, Rows, Shape::keys> tile{};
        multiply(tile, folded, lanes, 1, panels + p * width, panel, width);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < Shape::keys; ++c)
                store(scores + r * pitch + p + c * Vector<Real>::width, tile.at[r][c]);
    }
}

// The scores of a row outside its span become -inf.
template <class Real>
KORDER_INLINE void close_outside(Real* scores, std::int64_t first, std::int64_t last, Span span) {
    const Real closed = -Real(__builtin_inff());
    if (span.first >= span.last) return clear(scores + first, last - first, closed);
    if (span.first > first) clear(scores + first, span.first - first, closed);
    if (span.last < last) clear(scores + span.last, last - span.last, closed);
}

template <class Real>
KORDER_INLINE void add_row(Real* scores, const Real* extra, std::int64_t first, std::int64_t last) {
    for (std::int64_t j = first; j < last; j += Vector<Real>::width) store(scores + j, load(scores + j) + load(extra + j));
}

template <class Real>
KORDER_INLINE Real largest_in(const Real* scores, std::int64_t first, std::int64_t last) {
    constexpr int width = Vector<Real>::width;
    vec<Real> tops[Shape::keys];
#pragma GCC unroll 4
    for (int c = 0; c < Shape::keys; ++c) tops[c] = load(scores + first + c * width);
    for (std::int64_t j = first + Sizes<Real>::panel; j < last; j += Sizes<Real>::panel)
#pragma GCC unroll 4
        for (int c = 0; c < Shape::keys; ++c) tops[c] = larger<Real>(tops[c], load(scores + j + c * width));
#pragma GCC unroll 4
    for (int c = 1; c < Shape::keys; ++c) tops[0] = larger<Real>(tops[0], tops[c]);
    return largest_of<Real>(tops[0]);
}

// scores become exp(score - reference); the sum is returned.
template <class Real>
KORDER_INLINE Real exponentiate(Real* scores, std::int64_t first, std::int64_t last, Real reference) {
    constexpr int width = Vector<Real>::width;
    vec<Real> sums[Shape::keys] = {};
    for (std::int64_t j = first; j < last; j += Sizes<Real>::panel)
#pragma GCC unroll 4
        for (int c = 0; c < Shape::keys; ++c) {
            const vec<Real> weight = exponential<Real>(load(scores + j + c * width) - reference);
            store(scores + j + c * width, weight);
            sums[c] += weight;
        }
#pragma GCC unroll 4
    for (int c = 1; c < Shape::keys; ++c) sums[0] += sums[c];
    return sum_of<Real>(sums[0]);
}

// Weighted values of rows, [rows][padded], and what their roundings lost: there may be many outer tuples, each of which
// adds a little, and in float32 that would show.
template <class Real>
struct Weighted {
    Real *sums, *lost;
};

// weighted[r] = weighted[r] * rescale[r] + gate * (one register tile), for the columns from `c` on.
template <int Rows, bool Gated, class Real, int All, int Vectors>
KORDER_INLINE void add_values(const Tile<Real, All, Vectors>& tile, std::int64_t c, std::int64_t padded,
                              const Real* rescale, const Real* gate, const Weighted<Real>& weighted) {
    constexpr int width = Vector<Real>::width;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            const std::int64_t at = r * padded + c + v * width;
            const vec<Real> before = load(weighted.sums + at) * rescale[r];
            vec<Real> part = -load(weighted.lost + at) * rescale[r];
            if constexpr (Gated)
                part += load(gate + c + v * width) * tile.at[r][v];
            else
                part += tile.at[r][v];
            const vec<Real> sum = before + part;
            store(weighted.sums + at, sum);
            store(weighted.lost + at, (sum - before) - part);
        }
}

// weighted[r] = weighted[r] * rescale[r] + gate * (sum of weights[r][j] values[j]) for the keys [first, last).
template <class Real, int Rows, bool Gated>
__attribute__((noinline)) void tile_values(const Real* weights, const Real* columns, std::int64_t room,
                                           std::int64_t padded, std::int64_t first, std::int64_t last,
                                           const Real* rescale, const Real* gate, const Weighted<Real>& weighted) {
    constexpr int column = Sizes<Real>::column, pitch = Sizes<Real>::pitch;
    for (std::int64_t c = 0; c < padded; c += column) {
        Tile<Real, Rows, Shape::columns> tile{};
        multiply(tile, weights + first, 1, pitch, columns + c * room + first * column, column, last - first);
        add_values<Rows, Gated>(tile, c, padded, rescale, gate, weighted);
    }
}

}  // namespace korder::KORDER_ISA
