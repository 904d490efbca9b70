// The forward's factors in bfloat16, two numbers of the summed axis side by side, as instructions for such products take
// them: AVX512-BF16 a pair at a time, AMX sixteen pairs. Sums are float32. Where a processor has neither, the same is done
// by float32 arithmetic; that is for tests, and no processor gains by it.
//
// panels:  [key / panel][column / 2][panel][2]      columns: [column / panel][key / 2][panel][2]
// The first factors are rows: weights, and folded queries. As in pack.hpp everything ends in zeros.
//
// The product of a query and an outer key has twice the bits of bfloat16, and lse is to be right in float32: so folded
// queries are a sum of as many terms as there are factors, up to the three that float32 has, and their products with keys
// are those of float32, but for numbers that are not normal, which count as zeros. Weights are rounded to bfloat16, as the
// output will be.
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

// Narrows the keys [first, last) of a row of weights, and returns the sum of what is left.
KORDER_INLINE float narrow_row(const float* weights, std::int64_t first, std::int64_t last, BFloat16* to) {
    vec<float> left = {};
    for (std::int64_t j = first; j < last; j += Vector<float>::width) left += narrow(load(weights + j), to + j);
    return sum_of<float>(left);
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

// The scale of scores in two parts: rows take a power of two, which adds no bits to them, scores the rest.
struct Scales {
    double rows;
    float scores;

    explicit Scales(double scale) : rows(scale), scores(1.0f) {
        int exponent;
        const double fraction = __builtin_frexp(scale, &exponent);
        if (__builtin_fabs(fraction) == 0.5) return;
        rows = __builtin_ldexp(1.0, exponent), scores = float(fraction);
    }
};

// The rows of tiles, [row][width in vectors], in float32 because outer keys are still to come.
inline void read_rows(const Call& call, const RowsAt& at, double factor, float* to) {
    const std::int64_t pitch = rounded(call.width, Sizes<float>::column);
    clear(to, rounded(at.count, Shape::rows) * pitch);
    for (std::int64_t r = 0; r < at.count; ++r)
        read_scaled(call.number, call.query, place(call.query, at.b, at.h, at.row + r), call.width, factor, to + r * pitch);
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

inline const BFloat16* folded_tile(const Call& call, const float* rows, const float* keys, BFloat16* to) {
    switch (call.order) {
        case 1: fold_terms<1>(rows, keys, call.width, to); break;
        case 2: fold_terms<2>(rows, keys, call.width, to); break;
        default: fold_terms<most_terms>(rows, keys, call.width, to);
    }
    return to;
}

// The same in float32 and float64.
template <class Real>
KORDER_INLINE const Real* folded_tile(const Call& call, const Real* rows, const Real* keys, Real* to) {
    return fold_tile(rows, keys, call.width, to);
}

}  // namespace korder::KORDER_ISA
