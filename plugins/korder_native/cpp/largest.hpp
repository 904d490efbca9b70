// The largest magnitude in an operand: whether a weight of zero makes a term zero depends on it.
#pragma once

#include "reading.hpp"

namespace korder::KORDER_ISA {

// Magnitudes of floating-point numbers are ordered as the integers that their bits are; NaN stands above infinity.
template <class Real, class Bits>
Real largest_in_rows(const Call& call, const Mode& mode, const Matrix& from, std::int64_t groups, std::int64_t length,
                     std::int64_t width, bool closes, Real* row) {
    Bits largest = 0;
    const Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
    for (std::int64_t b = 0; b < call.batch; ++b)
        for (std::int64_t g = 0; g < groups; ++g)
            for (std::int64_t i = 0; i < length; ++i) {
                if (!is_open(mode, b, g, i)) continue;
                read_row(call.number, from, place(from, b, g, i), width, row);
                for (std::int64_t l = 0; l < width; ++l) {
                    Bits bits;
                    __builtin_memcpy(&bits, row + l, sizeof bits);
                    const Bits size = closes && row[l] == -Real(__builtin_inff()) ? 0 : bits & ~sign;
                    largest = size > largest ? size : largest;
                }
            }
    Real found;
    __builtin_memcpy(&found, &largest, sizeof found);
    return found;
}

}  // namespace korder::KORDER_ISA
