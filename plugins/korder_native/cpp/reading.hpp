// Rows of the user's memory, whatever their dtype and strides, as dense rows of the dtype that is computed in.
#pragma once

#include "call.hpp"
#include "vector.hpp"

namespace korder::KORDER_ISA {

struct BFloat16 {
    std::uint16_t bits;
};

KORDER_INLINE float widened(float x) { return x; }
KORDER_INLINE double widened(double x) { return x; }
KORDER_INLINE float widened(BFloat16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

template <class Element, class Real, class Change>
KORDER_INLINE void read_as(const Matrix& from, std::int64_t offset, std::int64_t count, Real* to, Change change) {
    const Element* at = static_cast<const Element*>(from.data) + offset;
    if (from.column == 1)
        for (std::int64_t i = 0; i < count; ++i) to[i] = change(widened(at[i]));
    else
        for (std::int64_t i = 0; i < count; ++i) to[i] = change(widened(at[i * from.column]));
}

KORDER_INLINE std::int64_t place(const Matrix& x, std::int64_t b, std::int64_t h, std::int64_t i) {
    return b * x.batch + h * x.head + i * x.row;
}

template <class Real, class Change>
KORDER_INLINE void read_by(Number number, const Matrix& from, std::int64_t offset, std::int64_t count, Real* to,
                           Change change) {
    switch (number) {
        case Number::float32: return read_as<float>(from, offset, count, to, change);
        case Number::float64: return read_as<double>(from, offset, count, to, change);
        case Number::bfloat16: return read_as<BFloat16>(from, offset, count, to, change);
    }
}

template <class Real>
void read_row(Number number, const Matrix& from, std::int64_t offset, std::int64_t count, Real* to) {
    read_by(number, from, offset, count, to, [](auto x) { return Real(x); });
}

// The factor is float64, so that every number is rounded once and the factor itself not at all.
template <class Real>
void read_scaled(Number number, const Matrix& from, std::int64_t offset, std::int64_t count, double factor, Real* to) {
    read_by(number, from, offset, count, to, [factor](auto x) { return Real(double(x) * factor); });
}

KORDER_INLINE bool is_open(const Mode& mode, std::int64_t b, std::int64_t g, std::int64_t j) {
    if (!mode.mask.data) return true;
    const std::int64_t at = b * mode.mask.batch + g * mode.mask.head + j * mode.mask.column;
    return static_cast<const std::uint8_t*>(mode.mask.data)[at];
}

template <class Real>
KORDER_INLINE Real bias_at(const Call& call, const Mode& mode, std::int64_t b, std::int64_t h, std::int64_t i,
                           std::int64_t j) {
    Real found = 0;
    read_row(call.number, mode.bias, place(mode.bias, b, h, i) + j * mode.bias.column, 1, &found);
    return found;
}

template <class Real>
KORDER_INLINE void clear(Real* at, std::int64_t count, Real value = Real(0)) {
    for (std::int64_t i = 0; i < count; ++i) at[i] = value;
}

KORDER_INLINE std::int64_t lesser(std::int64_t x, std::int64_t y) { return x < y ? x : y; }
KORDER_INLINE std::int64_t greater(std::int64_t x, std::int64_t y) { return x > y ? x : y; }
KORDER_INLINE std::int64_t pieces(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }
KORDER_INLINE std::int64_t rounded(std::int64_t count, std::int64_t size) { return pieces(count, size) * size; }


}  // namespace korder::KORDER_ISA
