// The steps of one tile on the way back: its weights and score gradients, what they give through keys, and sums over rows.
#pragma once

#include "rows.hpp"

namespace korder::KORDER_ISA {

// gradients[r][j] = weights[r][j] * (gradients[r][j] - delta), and the sum of a row.
template <class Real>
KORDER_INLINE Real score_gradients(const Real* weights, Real* gradients, std::int64_t first, std::int64_t last,
                                   Real delta) {
    vec<Real> sum = {};
    for (std::int64_t j = first; j < last; j += Vector<Real>::width) {
        const vec<Real> found = load(weights + j) * (load(gradients + j) - delta);
        store(gradients + j, found);
        sum += found;
    }
    return sum_of<Real>(sum);
}

// into[r] += factor * (left right)[r], and sums += rows[r] * (left right)[r] over all rows; each may be left out.
template <class Real, int Rows>
__attribute__((noinline)) void tile_through(const Real* left, const Real* columns, std::int64_t room, std::int64_t width,
                                            Span keys, const Real* factor, Real* into, const Real* rows, Real* sums) {
    constexpr int column = Sizes<Real>::column, lanes = Vector<Real>::width, pitch = Sizes<Real>::pitch;
    for (std::int64_t c = 0; c < width; c += column) {
        Tile<Real, Rows, Shape::columns> tile{};
        multiply(tile, left + keys.first, 1, pitch, columns + c * room + keys.first * column, column,
                 keys.last - keys.first);
#pragma GCC unroll 4
        for (int v = 0; v < Shape::columns; ++v) {
            const std::int64_t at = c + v * lanes;
            vec<Real> sum = {};
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                if (into) {
                    const vec<Real> part = factor ? load(factor + at) * tile.at[r][v] : tile.at[r][v];
                    store(into + r * width + at, load(into + r * width + at) + part);
                }
                if (sums) sum += load(rows + r * width + at) * tile.at[r][v];
            }
            if (sums) store(sums + at, load(sums + at) + sum);
        }
    }
}

// What becomes of a sum over rows, left[row][j] right[row] for every key j: it is added to `to`, [count][width], times the
// outer keys' or values' product; and `others`, packed columns of the contracted mode with room for `room` keys, times it
// is added to `shared`, the sum over keys that outer modes share. Each but `right` may be left out. The sums are somebody's
// result: nothing beyond them is touched.
template <class Real>
struct OverRows {
    const Real *left, *right;
    std::int64_t rows, width, padded, count;
    const Real* factor;
    Real* to;
    const Real* others;
    std::int64_t room;
    Real* shared;
};

// One register tile of it, whose keys and columns may not all be there: a function of its own, so that the other tiles stay
// in registers.
template <class Real>
__attribute__((noinline)) void sum_corner_over_rows(const OverRows<Real>& x, std::int64_t j, std::int64_t c) {
    constexpr int lanes = Vector<Real>::width, column = Sizes<Real>::column;
    Tile<Real, Shape::rows, Shape::columns> tile{};
    multiply(tile, x.left + j, Sizes<Real>::pitch, 1, x.right + c, x.padded, x.rows);
    for (int r = 0; r < Shape::rows && r < x.count - j; ++r)
        for (int v = 0; v < Shape::columns && v * lanes < x.width - c; ++v) {
            const std::int64_t first = c + v * lanes;
            Real line[lanes];
            store(line, tile.at[r][v]);
            for (std::int64_t l = 0; l < lanes && l < x.width - first; ++l) {
                const Real factor = x.factor ? x.factor[first + l] : Real(1);
                if (x.to) x.to[(j + r) * x.width + first + l] += factor * line[l];
                if (x.shared) x.shared[first + l] += x.others[c * x.room + (j + r) * column + v * lanes + l] * line[l];
            }
        }
}

// The keys of a span of panels that are below `count`.
template <class Real>
__attribute__((noinline)) void sum_over_rows(const OverRows<Real>& x, Span keys) {
    constexpr int height = Shape::rows, column = Sizes<Real>::column, lanes = Vector<Real>::width;
    for (std::int64_t j = keys.first; j < lesser(keys.last, x.count); j += height)
        for (std::int64_t c = 0; c < x.width; c += column) {
            if (j + height > x.count || c + column > x.width) {
                sum_corner_over_rows(x, j, c);
                continue;
            }
            Tile<Real, height, Shape::columns> tile{};
            multiply(tile, x.left + j, Sizes<Real>::pitch, 1, x.right + c, x.padded, x.rows);
#pragma GCC unroll 4
            for (int v = 0; v < Shape::columns; ++v) {
                const std::int64_t first = c + v * lanes;
                if (x.to) {
                    const vec<Real> factor = x.factor ? load(x.factor + first) : spread(Real(1));
#pragma GCC unroll 8
                    for (int r = 0; r < height; ++r) {
                        Real* at = x.to + (j + r) * x.width + first;
                        store(at, load(at) + factor * tile.at[r][v]);
                    }
                }
                if (!x.shared) continue;
                const Real* others = x.others + c * x.room + j * column + v * lanes;
                vec<Real> sum = {};
#pragma GCC unroll 8
                for (int r = 0; r < height; ++r) sum += load(others + r * column) * tile.at[r][v];
                store(x.shared + first, load(x.shared + first) + sum);
            }
        }
}

template <class Real>
struct GradientTile {
    static constexpr int rows = Shape::rows, pitch = Sizes<Real>::pitch, lanes = Sizes<Real>::lanes;
    const Call& call;
    const RowBlock<Real>& block;
    std::int64_t room;
    const Real *key_panels, *value_panels, *key_columns;
    const Real* outer_keys;

    // Makes weights and score gradients of the rows from `row` on; zero outside their keys within `whole`, and a little
    // beyond it, where the sums over rows look. Returned are the panels with live keys.
    Span weights(std::int64_t row, const Span* spans, const Real* bias, bool extra, Span whole) const {
        Real *weights = block.weights + row * pitch, *gradients = block.gradients + row * pitch;
        const Span keys = panels_of(spans);
        for (int r = 0; r < rows; ++r) {
            clear_around(weights + r * pitch, whole, keys);
            clear_around(gradients + r * pitch, whole, keys);
            block.row_sums[row + r] = Real(0);
        }
        if (keys.first >= keys.last) return keys;
        const std::int64_t tile = row / rows * lanes;
        tile_scores<Real, rows>(block.folded_tiles + tile * call.width, key_panels, call.width, keys.first, keys.last,
                                weights);
        for (int r = 0; r < rows; ++r) {
            Real* at = weights + r * pitch;
            if (extra) add_row(at, block.extra + (row + r) * pitch, keys.first, keys.last);
            close_outside(at, keys.first, keys.last, spans[r]);
            exponentiate(at, keys.first, keys.last, block.reference[row + r] - bias[r]);
        }
        tile_scores<Real, rows>(block.gated_tiles + tile * call.value_width, value_panels, call.value_width, keys.first,
                                keys.last, gradients);
        for (int r = 0; r < rows; ++r)
            block.row_sums[row + r] = score_gradients(weights + r * pitch, gradients + r * pitch, keys.first, keys.last,
                                                      block.delta[row + r]);
        return keys;
    }

    void through_keys(std::int64_t row, Span keys, bool to_outer) const {
        const std::int64_t at = row * block.width;
        tile_through<Real, rows>(block.gradients + row * pitch, key_columns, room, block.width, keys, outer_keys,
                                 block.of_queries + at, block.query_rows + at, to_outer ? block.key_sums : nullptr);
    }

private:
    static Span panels_of(const Span* spans) {
        Span all{INT64_MAX, 0};
        for (int r = 0; r < rows; ++r)
            if (spans[r].first < spans[r].last)
                all.first = lesser(all.first, spans[r].first), all.last = greater(all.last, spans[r].last);
        return OuterWalk<Real, rows>::in_panels(all);
    }

    static void clear_around(Real* at, Span whole, Span keys) {
        if (keys.first >= keys.last) return clear(at + whole.first, whole.last + rows - 1 - whole.first);
        clear(at + whole.first, keys.first - whole.first);
        clear(at + keys.last, whole.last + rows - 1 - keys.last);
    }
};

}  // namespace korder::KORDER_ISA
