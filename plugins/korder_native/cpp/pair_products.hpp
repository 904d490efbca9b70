// Products of bfloat16 a pair at a time, in registers (AVX512-BF16), and the same by arithmetic, for tests, but for numbers that are not normal.
#pragma once

#include "pairs.hpp"

namespace korder::KORDER_ISA {

// There are no matrix registers to be had.
struct MatrixTiles {
    MatrixTiles() {}
};

typedef std::uint32_t LoosePairs __attribute__((vector_size(KORDER_VECTOR_BYTES), aligned(2), may_alias));

KORDER_INLINE vec<float> add_products(vec<float> sums, Wholes left, Wholes right) {
#if defined(__AVX512BF16__)
    return (vec<float>)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
#else
    const vec<float> even = (vec<float>)(left << 16) * (vec<float>)(right << 16);
    return sums + even + (vec<float>)(left & 0xffff0000u) * (vec<float>)(right & 0xffff0000u);
#endif
}

// sums += left right: terms of the left factor `term` numbers apart, its rows `row`, pairs of the summed axis two.
template <int Terms, int Rows, int Vectors>
KORDER_INLINE void multiply(Tile<float, Rows, Vectors>& sums, const BFloat16* left, std::int64_t term, std::int64_t row,
                            const BFloat16* right, std::int64_t pairs) {
    constexpr int width = Vector<float>::width;
#pragma GCC unroll 2
    for (std::int64_t l = 0; l < pairs; ++l, left += 2, right += 2 * Vectors * width) {
        Wholes columns[Vectors];
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; ++c) columns[c] = *reinterpret_cast<const LoosePairs*>(right + 2 * c * width);
#pragma GCC unroll 3
        for (int t = 0; t < Terms; ++t)
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) {
                std::uint32_t pair;
                __builtin_memcpy(&pair, left + t * term + r * row, sizeof pair);
                const Wholes one = pair - Wholes{};
#pragma GCC unroll 8
                for (int c = 0; c < Vectors; ++c) sums.at[r][c] = add_products(sums.at[r][c], one, columns[c]);
            }
    }
}

// scores[r][j] = scale * (folded[r] . key j) for the panels [first, last) of packed keys, `first` and `last` in keys.
template <int Rows, int Terms>
__attribute__((noinline)) void pair_scores(const BFloat16* folded, const BFloat16* panels, std::int64_t width, float scale,
                                           std::int64_t first, std::int64_t last, float* scores) {
    constexpr int panel = Sizes<float>::panel, pitch = Sizes<float>::pitch;
    const std::int64_t depth = depth_of<BFloat16>(width), row = rounded(width, Sizes<float>::column);
    for (std::int64_t p = first; p < last; p += panel) {
        Tile<float, Rows, Shape::keys> tile{};
        multiply<Terms>(tile, folded, Shape::rows * row, row, panels + p * depth, depth / 2);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < Shape::keys; ++c)
                store(scores + r * pitch + p + c * Vector<float>::width, scale * tile.at[r][c]);
    }
}

// As `tile_values`, of weights that were narrowed.
template <int Rows, bool Gated>
__attribute__((noinline)) void pair_values(const BFloat16* weights, const BFloat16* columns, std::int64_t room,
                                           std::int64_t padded, std::int64_t first, std::int64_t last,
                                           const float* rescale, const float* gate, const Weighted<float>& weighted) {
    constexpr int column = Sizes<float>::column, pitch = Sizes<float>::pitch;
    for (std::int64_t c = 0; c < padded; c += column) {
        Tile<float, Rows, Shape::columns> tile{};
        multiply<1>(tile, weights + first, 0, pitch, columns + c * room + first * column, (last - first) / 2);
        add_values<Rows, Gated>(tile, c, padded, rescale, gate, weighted);
    }
}

}  // namespace korder::KORDER_ISA
