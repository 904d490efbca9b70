// The contracted mode in the order in which register tiles read it, packed once for all queries and outer keys.
//
// panels:  [key / panel][column][panel]          the second factor of a product over columns
// columns: [column / panel][key][panel]          the second factor of a product over keys
// Both end in zeros, so that no product looks where it ends. Masked keys are zeros whatever they hold.
#pragma once

#include "reading.hpp"

namespace korder::KORDER_ISA {

template <class Real>
struct Sizes {
    static constexpr int width = Vector<Real>::width;
    static constexpr int rows = Shape::rows;
    static constexpr int lanes = rows > 8 ? rows : 8;  // rows of a tile as folded queries are stored
    static constexpr int panel = Shape::keys * width;
    static constexpr int column = Shape::columns * width;
    static constexpr int keys = 1920 / int(sizeof(Real));  // at most, of a block; a multiple of every panel
    static constexpr int pitch = keys + 64 / int(sizeof(Real));  // of a row of scores; not a power of two
};

static_assert(Sizes<float>::keys % Sizes<float>::panel == 0 && Sizes<double>::keys % Sizes<double>::panel == 0);

// Where the rows of one mode of one head are.
struct Rows {
    const Call& call;
    const Mode& mode;
    const Matrix& matrix;
    std::int64_t width, b, g;

    template <class Real>
    KORDER_INLINE void read(std::int64_t j, Real* to) const {
        if (j < mode.length && is_open(mode, b, g, j))
            read_row(call.number, matrix, place(matrix, b, g, j), width, to);
        else
            clear(to, width);
    }
};

// Packs one panel of keys from `first` on; `scratch` holds panel * width numbers.
template <class Real>
void pack_panel(const Rows& rows, std::int64_t first, Real* scratch, Real* to) {
    constexpr int panel = Sizes<Real>::panel;
    for (int j = 0; j < panel; ++j) rows.read(first + j, scratch + j * rows.width);
    for (std::int64_t l = 0; l < rows.width; ++l)
        for (int j = 0; j < panel; ++j) to[l * panel + j] = scratch[j * rows.width + l];
}

// Packs the columns of the keys [first, last) of a chunk that begins at `start` and has room for `room` keys.
template <class Real>
void pack_columns(const Rows& rows, std::int64_t start, std::int64_t first, std::int64_t last, std::int64_t room,
                  Real* scratch, Real* to) {
    constexpr int column = Sizes<Real>::column;
    const std::int64_t padded = rounded(rows.width, column);
    clear(scratch + rows.width, padded - rows.width);
    for (std::int64_t j = first; j < last; ++j) {
        rows.read(j, scratch);
        for (std::int64_t c = 0; c < padded; c += column)
            for (int l = 0; l < column; ++l) to[(c / column * room + j - start) * column + l] = scratch[c + l];
    }
}

}  // namespace korder::KORDER_ISA
