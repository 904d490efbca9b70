// A chunk of rows and of the keys that they bring, as the running kernels want them: features of several monomials side by
// side in a vector, one vector a row, because sums run along rows.
#pragma once

#include "arena.hpp"
#include "features.hpp"
#include "lanes.hpp"

namespace korder::KORDER_ISA {

template <class Real, std::int64_t Chunk>
class RunningFeatures {
public:
    static constexpr int width = Vector<Real>::width;
    static constexpr std::int64_t pitch = Chunk + 64 / sizeof(Real);

    RunningFeatures(Arena& arena, const Monomials& table, std::int64_t channels, std::int64_t sets)
        : table_(table),
          columns_(arena.take<Real>(table.width * pitch)),
          ones_(arena.take<Real>(pitch)),
          rows_(arena.take<Real>(width * pitch)),
          token_(arena.take<Real>(greater(table.width, channels))),
          lanes_(arena.take<Real>(sets * Chunk * width)),
          walk_(columns_, arena.take<Real>((table.degree + 1) * pitch), ones_, pitch) {
        if (ones_) clear(ones_, pitch, Real(1));
    }

    void read(const TokenColumns& from, std::int64_t length, std::int64_t first, std::int64_t count) {
        walk_.read(from, table_.width, length, first, count, token_);
    }

    // Makes the features [first, last) of degree s, at most a vector of them, times factors: [row][feature], zeros behind.
    void make(std::int64_t s, std::int64_t first, std::int64_t last, bool starts, const Real* factors, std::int64_t set) {
        for (std::int64_t leaf = first; leaf < first + width; ++leaf) {
            Real* to = rows_ + (leaf - first) * pitch;
            if (leaf >= last) {
                clear(to, Chunk);
                continue;
            }
            const Real factor = factors ? factors[table_.offsets[s] + leaf] : Real(1);
            if (s == 0) {
                clear(to, Chunk, factor);
                continue;
            }
            const std::int32_t* path = table_.degrees[s].paths + leaf * s;
            walk_.walk(path, starts && leaf == first ? 1 : table_.degrees[s].levels[leaf], s, Chunk);
            const Real *one = walk_.product(s - 1), *other = walk_.column(path[s - 1]);
            for (std::int64_t j = 0; j < Chunk; j += width) store(to + j, load(one + j) * load(other + j) * factor);
        }
        transpose_columns(rows_, pitch, Chunk, lanes_ + set * Chunk * width, width);
    }

    const Real* lanes(std::int64_t set = 0) const { return lanes_ + set * Chunk * width; }
    Real* rows() const { return rows_; }
    // Another walk over the same columns, with products of its own.
    Ancestors<Real> walk(Real* products) const { return {columns_, products, ones_, pitch}; }

private:
    const Monomials& table_;
    Real *columns_, *ones_, *rows_, *token_, *lanes_;
    Ancestors<Real> walk_;
};

// The values of the keys that a chunk of rows brings: [channel][row], zeros where there is none.
template <class Real>
void read_running_values(const RunningKeys& mode, std::int64_t channels, std::int64_t first, std::int64_t count,
                         std::int64_t chunk, Real* token, Real* to) {
    for (std::int64_t j = 0; j < chunk; ++j) {
        if (j < count && first + j >= 0 && first + j < mode.length)
            read_values(mode.values, mode.columns.open, channels, first + j, 1.0, token);
        else
            clear(token, channels);
        for (std::int64_t c = 0; c < channels; ++c) to[c * chunk + j] = token[c];
    }
}

// Numbers of `count` features, `step` apart in double sums, side by side; zeros behind.
template <class Real>
KORDER_INLINE vec<Real> gathered(const double* from, std::int64_t step, std::int64_t count) {
    constexpr int width = Vector<Real>::width;
    Real found[width] = {};
    if (count >= width)
#pragma GCC unroll 16
        for (int l = 0; l < width; ++l) found[l] = Real(from[l * step]);
    else
        for (std::int64_t l = 0; l < count; ++l) found[l] = Real(from[l * step]);
    return load(found);
}

template <class Real>
KORDER_INLINE void scatter_added(double* to, std::int64_t step, std::int64_t count, vec<Real> from, double sign = 1.0) {
    constexpr int width = Vector<Real>::width;
    Real found[width];
    store(found, from);
    if (count >= width)
#pragma GCC unroll 16
        for (int l = 0; l < width; ++l) to[l * step] += sign * double(found[l]);
    else
        for (std::int64_t l = 0; l < count; ++l) to[l * step] += sign * double(found[l]);
}

}  // namespace korder::KORDER_ISA
