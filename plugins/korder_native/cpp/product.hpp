// The register tile: a few rows times a few vectors of columns, summed over a length that may be anything.
#pragma once

#include "vector.hpp"

namespace korder::KORDER_ISA {

template <class Real, int Rows, int Vectors>
struct Tile {
    vec<Real> at[Rows][Vectors];
};

// sum over l < length of left[l * step + r * row] * right[l * next + ...], for every row r and vector of columns.
template <class Real, int Rows, int Vectors>
KORDER_INLINE void multiply(Tile<Real, Rows, Vectors>& sums, const Real* left, std::int64_t step, std::int64_t row,
                            const Real* right, std::int64_t next, std::int64_t length) {
    constexpr int width = Vector<Real>::width;
#pragma GCC unroll 4
    for (std::int64_t l = 0; l < length; ++l) {
        vec<Real> columns[Vectors];
#pragma GCC unroll 4
        for (int c = 0; c < Vectors; ++c) columns[c] = load(right + c * width);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const vec<Real> one = spread(left[r * row]);
#pragma GCC unroll 4
            for (int c = 0; c < Vectors; ++c) sums.at[r][c] += one * columns[c];
        }
        left += step;
        right += next;
    }
}

}  // namespace korder::KORDER_ISA
