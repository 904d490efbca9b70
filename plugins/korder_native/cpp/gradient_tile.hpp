// The steps of one tile on the way back: its weights and score gradients, and what they give through keys and values.
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

// One tile of `sum_over_rows` whose rows or columns are not all there; `count` and `columns` are. A function of its own, so
// that the other tiles stay in registers.
template <class Real>
__attribute__((noinline)) void sum_corner_over_rows(const Real* left, const Real* right, std::int64_t rows,
                                                    std::int64_t padded, std::int64_t count, std::int64_t columns,
                                                    std::int64_t width, Real* to) {
    constexpr int lanes = Vector<Real>::width;
    Tile<Real, Shape::rows, Shape::columns> tile{};
    multiply(tile, left, Sizes<Real>::pitch, 1, right, padded, rows);
    for (int r = 0; r < Shape::rows && r < count; ++r)
        for (int v = 0; v < Shape::columns && v * lanes < columns; ++v) {
            Real* at = to + r * width + v * lanes;
            if ((v + 1) * lanes <= columns) {
                store(at, load(at) + tile.at[r][v]);
                continue;
            }
            Real line[lanes];
            store(line, tile.at[r][v]);
            for (int c = 0; c < columns - v * lanes; ++c) at[c] += line[c];
        }
}

// sums[j] += sum over rows of left[row][j] right[row], for the keys j of a span of panels that are below `count`. The
// sums are dense, [count][width], and may be somebody's result: nothing beyond them is touched.
template <class Real>
__attribute__((noinline)) void sum_over_rows(const Real* left, const Real* right, std::int64_t rows, Span keys,
                                             std::int64_t padded, std::int64_t count, std::int64_t width, Real* sums) {
    constexpr int height = Shape::rows, column = Sizes<Real>::column, lanes = Vector<Real>::width;
    for (std::int64_t j = keys.first; j < lesser(keys.last, count); j += height)
        for (std::int64_t c = 0; c < width; c += column) {
            Real* to = sums + j * width + c;
            if (j + height > count || c + column > width) {
                sum_corner_over_rows(left + j, right + c, rows, padded, count - j, width - c, width, to);
                continue;
            }
            Tile<Real, height, Shape::columns> tile{};
            multiply(tile, left + j, Sizes<Real>::pitch, 1, right + c, padded, rows);
#pragma GCC unroll 8
            for (int r = 0; r < height; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < Shape::columns; ++v) {
                    Real* at = to + r * width + v * lanes;
                    store(at, load(at) + tile.at[r][v]);
                }
        }
}

template <class Real>
struct GradientTile {
    static constexpr int rows = Shape::rows, pitch = Sizes<Real>::pitch, lanes = Sizes<Real>::lanes;
    const Call& call;
    const RowBlock<Real>& block;
    std::int64_t room;
    const Real *key_panels, *value_panels, *key_columns, *value_columns;
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

    void through_values(std::int64_t row, Span keys) const {
        tile_through<Real, rows>(block.weights + row * pitch, value_columns, room, block.value_width, keys, nullptr, nullptr,
                                 block.gradient_rows + row * block.value_width, block.value_sums);
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
