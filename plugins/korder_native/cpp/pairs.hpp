// The forward's factors in bfloat16, two numbers of the summed axis side by side, as instructions for such products take
// them: AVX512-BF16 a pair at a time, AMX sixteen pairs. Sums are float32. Where a processor has neither, the same is done
// by float32 arithmetic; that is for tests, and no processor gains by it.
//
// panels:  [key / panel][column / 2][panel][2]      columns: [column / panel][key / 2][panel][2]
// The first factors are rows: weights, and folded queries. As in pack.hpp everything ends in zeros.
//
// The product of a query and an outer key has twice the bits of bfloat16, and lse is to be right in float32: so folded
// queries are a sum of as many terms as there are factors, up to the three that float32 has, and their products with keys
// are the same as in float32. Weights are rounded to bfloat16, as the output will be.
#pragma once

#include "outer.hpp"
#include "tile.hpp"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace korder::KORDER_ISA {

// What the products of a factor are summed in.
template <class Factor>
struct Summed {
    typedef Factor type;
};
template <>
struct Summed<BFloat16> {
    typedef float type;
};

// How many numbers of the summed axis a product takes at a time.
#if defined(KORDER_MATRIX_TILES)
constexpr int product_depth = 32;
static_assert(Sizes<float>::panel == 32 && Sizes<float>::column == 32 && Shape::rows == 16);
#else
constexpr int product_depth = 2;
static_assert(Sizes<float>::panel % 2 == 0);
#endif

template <class Factor>
KORDER_INLINE std::int64_t depth_of(std::int64_t width) {
    return sizeof(Factor) == sizeof(BFloat16) ? rounded(width, product_depth) : width;
}

constexpr int most_terms = 3;

// Numbers of one tile of rows before outer keys are folded in, and of all terms after it.
template <class Factor>
KORDER_INLINE std::int64_t tile_numbers(std::int64_t width) {
    return sizeof(Factor) == sizeof(BFloat16) ? Shape::rows * rounded(width, Sizes<float>::column)
                                              : width * Sizes<Factor>::lanes;
}

template <class Factor>
KORDER_INLINE std::int64_t folded_numbers(const Call& call) {
    return tile_numbers<Factor>(call.width) * (sizeof(Factor) == sizeof(BFloat16) ? lesser(call.order, most_terms) : 1);
}

typedef std::uint16_t Halves __attribute__((vector_size(KORDER_VECTOR_BYTES / 2)));
typedef std::uint32_t Wholes __attribute__((vector_size(KORDER_VECTOR_BYTES)));

// To the nearest, to even between two; NaN and infinity are not among them, and numbers that are not normal become what
// the processor makes of them. Returned is what is left.
KORDER_INLINE vec<float> narrow(vec<float> numbers, BFloat16* to) {
#if defined(__AVX512BF16__)
    const Halves narrowed = (Halves)_mm512_cvtneps_pbh((__m512)numbers);
#else
    const Wholes bits = (Wholes)numbers;
    const Halves narrowed = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
#endif
    __builtin_memcpy(to, &narrowed, sizeof narrowed);
    return numbers - (vec<float>)(__builtin_convertvector(narrowed, Wholes) << 16);
}

// What was widened before.
KORDER_INLINE BFloat16 upper_half(float number) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &number, sizeof bits);
    return {std::uint16_t(bits >> 16)};
}

// Packs one panel of keys from `first` on; `scratch` holds panel * width numbers.
inline void pack_panel(const Rows& rows, std::int64_t first, float* scratch, BFloat16* to) {
    constexpr int panel = Sizes<float>::panel;
    clear(to, panel * depth_of<BFloat16>(rows.width), BFloat16{0});
    for (int j = 0; j < panel; ++j) rows.read(first + j, scratch + j * rows.width);
    for (std::int64_t l = 0; l < rows.width; ++l)
        for (int j = 0; j < panel; ++j) to[(l / 2 * panel + j) * 2 + l % 2] = upper_half(scratch[j * rows.width + l]);
}

// Packs the columns of the keys [first, last) of a chunk that begins at `start` and has room for `room` keys.
inline void pack_columns(const Rows& rows, std::int64_t start, std::int64_t first, std::int64_t last, std::int64_t room,
                         float* scratch, BFloat16* to) {
    constexpr int column = Sizes<float>::column;
    const std::int64_t padded = rounded(rows.width, column);
    clear(scratch + rows.width, padded - rows.width);
    for (std::int64_t j = first; j < last; ++j) {
        rows.read(j, scratch);
        const std::int64_t pair = (j - start) / 2, side = (j - start) % 2;
        for (std::int64_t c = 0; c < padded; c += column)
            for (int l = 0; l < column; ++l)
                to[((c / column * room / 2 + pair) * column + l) * 2 + side] = upper_half(scratch[c + l]);
    }
}

// The rows of tiles, [row][width in vectors], in float32 because outer keys are still to come; nothing is scaled, so that
// at order 1 the products are of the operands themselves.
inline void read_rows(const Call& call, const RowsAt& at, float* to) {
    const std::int64_t pitch = rounded(call.width, Sizes<float>::column);
    clear(to, rounded(at.count, Shape::rows) * pitch);
    for (std::int64_t r = 0; r < at.count; ++r)
        read_row(call.number, call.query, place(call.query, at.b, at.h, at.row + r), call.width, to + r * pitch);
}

// A tile of rows times the products of outer keys as a sum of terms, [term][row][width in vectors].
template <int Terms>
KORDER_INLINE void fold_terms(const float* rows, const float* keys, std::int64_t width, BFloat16* to) {
    constexpr int lanes = Vector<float>::width;
    const std::int64_t pitch = rounded(width, Sizes<float>::column), term = Shape::rows * pitch;
    for (int r = 0; r < Shape::rows; ++r)
        for (std::int64_t l = r * pitch, c = 0; c < pitch; c += lanes, l += lanes) {
            vec<float> left = keys ? load(rows + l) * load(keys + c) : load(rows + l);
#pragma GCC unroll 3
            for (int t = 0; t < Terms; ++t) left = narrow(left, to + t * term + l);
        }
}

#if defined(__AMX_BF16__)

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start = 0, unused[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The processor's matrix registers, from here to the end of a block.
struct MatrixTiles {
    MatrixTiles() {
        const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~MatrixTiles() { _tile_release(); }
};

// sums = left right: 16 rows, 32 columns.
template <int Terms>
KORDER_INLINE void multiply(Tile<float, 16, 2>& sums, const BFloat16* left, std::int64_t term, std::int64_t row,
                            const BFloat16* right, std::int64_t pairs) {
    constexpr std::int64_t next = 2 * 32;
    _tile_zero(0);
    _tile_zero(1);
    for (std::int64_t l = 0; l < pairs; l += 16) {
        _tile_loadd(2, right + l * next, next * 2);
        _tile_loadd(3, right + l * next + 32, next * 2);
#pragma GCC unroll 3
        for (int t = 0; t < Terms; ++t) {
            _tile_loadd(4, left + t * term + 2 * l, row * 2);
            _tile_dpbf16ps(0, 4, 2);
            _tile_dpbf16ps(1, 4, 3);
        }
    }
    _tile_stored(0, &sums.at[0][0], sizeof sums.at[0]);
    _tile_stored(1, &sums.at[0][1], sizeof sums.at[0]);
}

#else

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

#endif

// How many rows of a tile products take: matrix registers take all of them always.
template <int Rows>
constexpr int product_rows() {
#if defined(KORDER_MATRIX_TILES)
    return Shape::rows;
#else
    return Rows;
#endif
}

// scores[r][j] = scale * (folded[r] . key j) for the panels [first, last) of packed keys, `first` and `last` in keys.
template <int Rows, int Terms>
__attribute__((noinline)) void pair_scores(const BFloat16* folded, const BFloat16* panels, std::int64_t width, float scale,
                                           std::int64_t first, std::int64_t last, float* scores) {
    constexpr int panel = Sizes<float>::panel, pitch = Sizes<float>::pitch;
    const std::int64_t depth = depth_of<BFloat16>(width), row = rounded(width, Sizes<float>::column);
    for (std::int64_t p = first; p < last; p += panel) {
        Tile<float, product_rows<Rows>(), Shape::keys> tile{};
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
                                           const float* rescale, const float* gate, float* weighted) {
    constexpr int column = Sizes<float>::column, pitch = Sizes<float>::pitch;
    for (std::int64_t c = 0; c < padded; c += column) {
        Tile<float, product_rows<Rows>(), Shape::columns> tile{};
        multiply<1>(tile, weights + first, 0, pitch, columns + c * room + first * column, (last - first) / 2);
        add_values<Rows, Gated>(tile, c, padded, rescale, gate, weighted);
    }
}

// What products of either kind take for scores: rows times outer keys.
template <class Real>
KORDER_INLINE const Real* folded_tile(const Call& call, const Real* rows, const Real* keys, Real* to) {
    return fold_tile(rows, keys, call.width, to);
}

inline const BFloat16* folded_tile(const Call& call, const float* rows, const float* keys, BFloat16* to) {
    switch (call.order) {
        case 1: fold_terms<1>(rows, keys, call.width, to); break;
        case 2: fold_terms<2>(rows, keys, call.width, to); break;
        default: fold_terms<most_terms>(rows, keys, call.width, to);
    }
    return to;
}

// Scores by products of either kind; in float32 and float64 the scale is in the folded rows.
template <int Rows, class Real>
KORDER_INLINE void scores_of(const Call& call, const Real* folded, const Real* panels, std::int64_t first, std::int64_t last,
                             Real* scores) {
    tile_scores<Real, Rows>(folded, panels, call.width, first, last, scores);
}

template <int Rows>
KORDER_INLINE void scores_of(const Call& call, const BFloat16* folded, const BFloat16* panels, std::int64_t first,
                             std::int64_t last, float* scores) {
    const float scale = float(call.scale);
    switch (call.order) {
        case 1: return pair_scores<Rows, 1>(folded, panels, call.width, scale, first, last, scores);
        case 2: return pair_scores<Rows, 2>(folded, panels, call.width, scale, first, last, scores);
        default: return pair_scores<Rows, most_terms>(folded, panels, call.width, scale, first, last, scores);
    }
}

// The weighted values by products of either kind.
template <int Rows, bool Gated, class Real>
KORDER_INLINE void values_of(const Real* weights, const Real* columns, std::int64_t room, std::int64_t padded,
                             std::int64_t first, std::int64_t last, const Real* rescale, const Real* gate, Real* weighted) {
    tile_values<Real, Rows, Gated>(weights, columns, room, padded, first, last, rescale, gate, weighted);
}

template <int Rows, bool Gated>
KORDER_INLINE void values_of(const BFloat16* weights, const BFloat16* columns, std::int64_t room, std::int64_t padded,
                             std::int64_t first, std::int64_t last, const float* rescale, const float* gate,
                             float* weighted) {
    pair_values<Rows, Gated>(weights, columns, room, padded, first, last, rescale, gate, weighted);
}

}  // namespace korder::KORDER_ISA
