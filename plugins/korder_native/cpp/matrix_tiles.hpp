// Products of bfloat16 by matrix registers of 16 rows of 64 bytes (AMX), and the same by arithmetic, for tests.
#pragma once

#include "pairs.hpp"

namespace korder::KORDER_ISA {

// Registers 0 to 3 hold sums, 4 to 6 the terms of the left factor, 7 the right one. Instructions name their registers, so
// the numbers must be constants, and these macros.
#if defined(__AMX_BF16__)

#define KORDER_CLEAR(to) _tile_zero(to)
#define KORDER_LOAD(to, from, bytes) _tile_loadd(to, from, bytes)
#define KORDER_STORE(from, to, bytes) _tile_stored(from, to, bytes)
#define KORDER_ADD_PRODUCT(sums, left, right) _tile_dpbf16ps(sums, left, right)

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start = 0, unused[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The registers are a thread's from here to the end of a block.
struct MatrixTiles {
    MatrixTiles() {
        const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~MatrixTiles() { _tile_release(); }
};

#else

struct MatrixTiles {
    MatrixTiles() {}
};

// Register by register the same, but for the order of a sum and for numbers that are not normal.
struct MatrixRegister {
    unsigned char row[16][64];

    void clear() { __builtin_memset(row, 0, sizeof row); }

    void load(const void* from, std::int64_t bytes) {
        for (int r = 0; r < 16; ++r) __builtin_memcpy(row[r], static_cast<const char*>(from) + r * bytes, 64);
    }

    void store(void* to, std::int64_t bytes) const {
        for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(to) + r * bytes, row[r], 64);
    }

    void add_product(const MatrixRegister& left, const MatrixRegister& right) {
        for (int r = 0; r < 16; ++r) {
            float sums[16];
            BFloat16 ours[32], theirs[32];
            __builtin_memcpy(sums, row[r], sizeof sums);
            __builtin_memcpy(ours, left.row[r], sizeof ours);
            for (int l = 0; l < 16; ++l) {
                __builtin_memcpy(theirs, right.row[l], sizeof theirs);
                for (int c = 0; c < 16; ++c)
                    sums[c] += widened(ours[2 * l]) * widened(theirs[2 * c]) +
                               widened(ours[2 * l + 1]) * widened(theirs[2 * c + 1]);
            }
            __builtin_memcpy(row[r], sums, sizeof sums);
        }
    }
};

static thread_local MatrixRegister registers[8];

#define KORDER_CLEAR(to) registers[to].clear()
#define KORDER_LOAD(to, from, bytes) registers[to].load(from, bytes)
#define KORDER_STORE(from, to, bytes) registers[from].store(to, bytes)
#define KORDER_ADD_PRODUCT(sums, left, right) registers[sums].add_product(registers[left], registers[right])

#endif

#define KORDER_TERMS_TIMES(sums, from)                      \
    KORDER_LOAD(7, from, 128);                              \
    KORDER_ADD_PRODUCT(sums, 4, 7);                         \
    if constexpr (Terms > 1) KORDER_ADD_PRODUCT(sums, 5, 7); \
    if constexpr (Terms > 2) KORDER_ADD_PRODUCT(sums, 6, 7)

// to = left right: 16 rows, `Halves` times 32 columns, the second of them `apart` numbers behind the first; terms of the
// left factor are `term` numbers apart, its rows `row`, rows of the result `pitch`.
template <int Terms, int Halves>
KORDER_INLINE void multiply(const BFloat16* left, std::int64_t term, std::int64_t row, const BFloat16* right,
                            std::int64_t apart, std::int64_t pairs, float* to, std::int64_t pitch) {
    __asm__ volatile("" ::: "memory");  // GCC does not know that the loads below read memory
    KORDER_CLEAR(0);
    KORDER_CLEAR(1);
    if constexpr (Halves > 1) {
        KORDER_CLEAR(2);
        KORDER_CLEAR(3);
    }
    for (std::int64_t l = 0; l < pairs; l += 16, left += 32, right += 16 * 64) {
        KORDER_LOAD(4, left, row * 2);
        if constexpr (Terms > 1) KORDER_LOAD(5, left + term, row * 2);
        if constexpr (Terms > 2) KORDER_LOAD(6, left + 2 * term, row * 2);
        KORDER_TERMS_TIMES(0, right);
        KORDER_TERMS_TIMES(1, right + 32);
        if constexpr (Halves > 1) {
            KORDER_TERMS_TIMES(2, right + apart);
            KORDER_TERMS_TIMES(3, right + apart + 32);
        }
    }
    KORDER_STORE(0, to, pitch * 4);
    KORDER_STORE(1, to + 16, pitch * 4);
    if constexpr (Halves > 1) {
        KORDER_STORE(2, to + 32, pitch * 4);
        KORDER_STORE(3, to + 48, pitch * 4);
    }
}

#undef KORDER_TERMS_TIMES
#undef KORDER_CLEAR
#undef KORDER_LOAD
#undef KORDER_STORE
#undef KORDER_ADD_PRODUCT

// scores[r][j] = scale * (folded[r] . key j) for the panels [first, last) of packed keys, `first` and `last` in keys. Two
// panels together give the registers enough sums that do not wait for each other.
template <int Rows, int Terms>
__attribute__((noinline)) void pair_scores(const BFloat16* folded, const BFloat16* panels, std::int64_t width, float scale,
                                           std::int64_t first, std::int64_t last, float* scores) {
    constexpr int panel = Sizes<float>::panel, pitch = Sizes<float>::pitch;
    const std::int64_t depth = depth_of<BFloat16>(width), row = rounded(width, Sizes<float>::column);
    const std::int64_t term = Shape::rows * row, apart = panel * depth;
    for (std::int64_t p = first; p < last; p += 2 * panel)
        if (p + panel < last)
            multiply<Terms, 2>(folded, term, row, panels + p * depth, apart, depth / 2, scores + p, pitch);
        else
            multiply<Terms, 1>(folded, term, row, panels + p * depth, apart, depth / 2, scores + p, pitch);
    if (scale == 1.0f) return;
    for (int r = 0; r < Rows; ++r)
        for (std::int64_t j = first; j < last; j += Vector<float>::width)
            store(scores + r * pitch + j, scale * load(scores + r * pitch + j));
}

// As `tile_values`, of weights that were narrowed.
template <int Rows, bool Gated>
__attribute__((noinline)) void pair_values(const BFloat16* weights, const BFloat16* columns, std::int64_t room,
                                           std::int64_t padded, std::int64_t first, std::int64_t last,
                                           const float* rescale, const float* gate, const Weighted<float>& weighted) {
    constexpr int column = Sizes<float>::column, pitch = Sizes<float>::pitch;
    const std::int64_t apart = room * column, pairs = (last - first) / 2;
    for (std::int64_t c = 0; c < padded; c += 2 * column) {
        const BFloat16* right = columns + c * room + first * column;
        if (c + column < padded) {
            alignas(64) Tile<float, 16, 2 * Shape::columns> tile;
            multiply<1, 2>(weights + first, 0, pitch, right, apart, pairs, reinterpret_cast<float*>(&tile), 2 * column);
            add_values<Rows, Gated>(tile, c, padded, rescale, gate, weighted);
        } else {
            alignas(64) Tile<float, 16, Shape::columns> tile;
            multiply<1, 1>(weights + first, 0, pitch, right, apart, pairs, reinterpret_cast<float*>(&tile), column);
            add_values<Rows, Gated>(tile, c, padded, rescale, gate, weighted);
        }
    }
}

}  // namespace korder::KORDER_ISA
