// What tiles read of their own rows: queries and gradients as products want them, and biases and masks of their keys.
#pragma once

#include "outer.hpp"
#include "tile.hpp"

namespace korder::KORDER_ISA {

// The contracted mode's own additions to the scores of rows: -inf for masked keys, and its biases; false if it has none.
template <class Real>
bool make_extra(const Call& call, const RowsAt& at, std::int64_t rows, Span block, Real* extra) {
    const Mode& mode = call.contracted();
    if (!mode.mask.data && !mode.bias.data) return false;
    const std::int64_t length = block.last - block.first;
    for (std::int64_t r = 0; r < rows; ++r) {
        Real* to = extra + r * Sizes<Real>::pitch;
        const std::int64_t i = at.row + lesser(r, at.count - 1);
        if (mode.bias.data)
            read_row(call.number, mode.bias, place(mode.bias, at.b, at.h, i) + block.first * mode.bias.column, length, to);
        else
            clear(to, length);
        for (std::int64_t j = 0; mode.mask.data && j < length; ++j)
            if (!is_open(mode, at.b, at.h / call.share(), block.first + j)) to[j] = -Real(__builtin_inff());
        clear(to + length, rounded(length, Sizes<Real>::panel) - length);
    }
    return true;
}

// Rows as the first factor of products reads them, [tile][width][lanes], times a factor; rows that are not there are
// zeros.
template <class Real>
void read_tiles(const Call& call, const Matrix& from, std::int64_t width, const RowsAt& at, double factor, Real* scratch,
                Real* to) {
    constexpr int lanes = Sizes<Real>::lanes, rows = Sizes<Real>::rows;
    for (std::int64_t row = 0; row < at.count; row += rows, to += width * lanes)
        for (int r = 0; r < lanes; ++r) {
            if (r < rows && row + r < at.count)
                read_scaled(call.number, from, place(from, at.b, at.h, at.row + row + r), width, factor, scratch);
            else
                clear(scratch, width);
            for (std::int64_t l = 0; l < width; ++l) to[l * lanes + r] = scratch[l];
        }
}

// A block of rows on the way back.
template <class Real>
struct RowBlock {
    static constexpr int pitch = Sizes<Real>::pitch, lanes = Sizes<Real>::lanes;
    std::int64_t count, width, value_width;  // rows in whole tiles, widths in whole vectors
    Real *query_tiles, *gradient_tiles;      // [tile][width][lanes]
    Real *query_rows, *gradient_rows;        // [row][width in vectors]
    Real *folded_tiles, *gated_tiles;        // the tiles times outer keys, or values
    Real *weights, *gradients;               // of the scores, [row][pitch]
    Real *of_queries;                        // their gradient so far
    Real *reference, *delta, *row_sums;      // [row]
    Real *key_sums, *value_sums;             // of a tuple
    Real* extra;                             // [row][pitch]

    RowBlock(Arena& arena, const Call& call, std::int64_t rows)
        : count(rows),
          width(rounded(call.width, Sizes<Real>::column)),
          value_width(rounded(call.value_width, Sizes<Real>::column)) {
        const std::int64_t tiles = count / Shape::rows;
        query_tiles = arena.take<Real>(tiles * call.width * lanes);
        gradient_tiles = arena.take<Real>(tiles * call.value_width * lanes);
        query_rows = arena.take<Real>(count * width), gradient_rows = arena.take<Real>(count * value_width);
        const bool folds = call.outer() > 0;
        folded_tiles = folds ? arena.take<Real>(tiles * call.width * lanes) : query_tiles;
        gated_tiles = folds ? arena.take<Real>(tiles * call.value_width * lanes) : gradient_tiles;
        weights = arena.take<Real>(count * pitch), gradients = arena.take<Real>(count * pitch);
        of_queries = arena.take<Real>(count * width);
        reference = arena.take<Real>(count), delta = arena.take<Real>(count), row_sums = arena.take<Real>(count);
        key_sums = arena.take<Real>(width), value_sums = arena.take<Real>(value_width);
        const Mode& mode = call.contracted();
        extra = mode.mask.data || mode.bias.data ? arena.take<Real>(count * pitch) : nullptr;
    }

    void start(const Call& call, const RowsAt& at, Real* scratch) const {
        read_tiles(call, call.query, call.width, at, call.scale, scratch, query_tiles);
        read_tiles(call, call.output_gradient, call.value_width, at, 1.0, scratch, gradient_tiles);
        clear(query_rows, count * width), clear(gradient_rows, count * value_width);
        clear(of_queries, count * width), clear(reference, count), clear(delta, count);
        for (std::int64_t r = 0; r < at.count; ++r) {
            const std::int64_t i = at.row + r, place_of = (at.b * call.heads + at.h) * call.queries + i;
            Real *query = query_rows + r * width, *gradient = gradient_rows + r * value_width;
            read_scaled(call.number, call.query, place(call.query, at.b, at.h, i), call.width, call.scale, query);
            read_row(call.number, call.output_gradient, place(call.output_gradient, at.b, at.h, i), call.value_width,
                     gradient);
            const Real* output = static_cast<const Real*>(call.output) + place_of * call.value_width;
            const Real lse = static_cast<const Real*>(call.lse)[place_of];
            if (lse == -Real(__builtin_inff())) continue;  // nothing is live, and nothing will be read
            double sum = call.lse_gradient ? -double(static_cast<const Real*>(call.lse_gradient)[place_of]) : 0.0;
            for (std::int64_t c = 0; c < call.value_width; ++c) sum += double(gradient[c]) * double(output[c]);
            reference[r] = lse, delta[r] = Real(sum);
        }
    }

    bool start_block(const Call& call, const RowsAt& at, Span block) const {
        return extra && make_extra(call, at, count, block, extra);
    }

    void finish(const Call& call, const RowsAt& at, Real* to) const {
        for (std::int64_t r = 0; r < at.count; ++r)
            for (std::int64_t c = 0; c < call.width; ++c)
                to[r * call.width + c] += Real(call.scale * double(of_queries[r * width + c]));
    }

    // Folds a tuple of outer keys and values into the rows; at order 1 there are none.
    void fold(const Call& call, const RowsAt& at, const Real* keys, const Real* gate) const {
        if (!keys) return;
        const std::int64_t tiles = pieces(at.count, Shape::rows);
        for (std::int64_t t = 0; t < tiles; ++t) {
            fold_tile(query_tiles + t * call.width * lanes, keys, call.width, folded_tiles + t * call.width * lanes);
            fold_tile(gradient_tiles + t * call.value_width * lanes, gate, call.value_width,
                      gated_tiles + t * call.value_width * lanes);
        }
    }

    void start_tuple() const { clear(key_sums, width), clear(value_sums, value_width); }
};

}  // namespace korder::KORDER_ISA
