// A vector of numbers as wide as the registers, by the compiler's own extensions; one source for every instruction set.
//
// Every file of kernels is compiled once for each instruction set, inside a namespace of its own (KORDER_ISA), so that no
// function of one set can stand in for that of another. For the same reason kernels call no template of the standard
// library: the linker would keep one copy of it, and not say whose.
#pragma once

#include <cstdint>

#ifndef KORDER_ISA
#error "KORDER_ISA names the namespace of the instruction set that this file is compiled for"
#endif

#if defined(__AVX512F__)
#define KORDER_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KORDER_VECTOR_BYTES 32
#else
#define KORDER_VECTOR_BYTES 16
#endif

#define KORDER_INLINE inline __attribute__((always_inline))

namespace korder::KORDER_ISA {

template <class Real>
struct Vector;

template <>
struct Vector<float> {
    typedef float type __attribute__((vector_size(KORDER_VECTOR_BYTES)));
    typedef float loose __attribute__((vector_size(KORDER_VECTOR_BYTES), aligned(4), may_alias));
    typedef std::int32_t bits __attribute__((vector_size(KORDER_VECTOR_BYTES)));
    static constexpr std::int32_t magnitude = 0x7fffffff;  // all bits but the sign
    static constexpr int width = KORDER_VECTOR_BYTES / 4;
};

template <>
struct Vector<double> {
    typedef double type __attribute__((vector_size(KORDER_VECTOR_BYTES)));
    typedef double loose __attribute__((vector_size(KORDER_VECTOR_BYTES), aligned(8), may_alias));
    typedef std::int64_t bits __attribute__((vector_size(KORDER_VECTOR_BYTES)));
    static constexpr std::int64_t magnitude = 0x7fffffffffffffff;
    static constexpr int width = KORDER_VECTOR_BYTES / 8;
};

template <class Real>
using vec = typename Vector<Real>::type;

template <class Real>
KORDER_INLINE vec<Real> load(const Real* from) {
    return *reinterpret_cast<const typename Vector<Real>::loose*>(from);
}

template <class Real>
KORDER_INLINE void store(Real* to, vec<Real> value) {
    *reinterpret_cast<typename Vector<Real>::loose*>(to) = value;
}

template <class Real>
KORDER_INLINE vec<Real> spread(Real value) {
    return value - vec<Real>{};  // and not +, which would have to turn -0 into 0
}

template <class Real>
KORDER_INLINE vec<Real> larger(vec<Real> left, vec<Real> right) {
    return left > right ? left : right;
}

template <class Real>
KORDER_INLINE vec<Real> absolute(vec<Real> value) {
    typedef typename Vector<Real>::bits bits;
    return vec<Real>(bits(value) & Vector<Real>::magnitude);
}

// The sum, and the largest, of the lanes, in a fixed order.
template <class Real>
KORDER_INLINE Real sum_of(vec<Real> value) {
    Real lanes[Vector<Real>::width];
    store(lanes, value);
    for (int step = Vector<Real>::width / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    return lanes[0];
}

template <class Real>
KORDER_INLINE Real largest_of(vec<Real> value) {
    Real lanes[Vector<Real>::width];
    store(lanes, value);
    for (int step = Vector<Real>::width / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    return lanes[0];
}

// How many numbers a register tile holds: rows x (vectors of keys, or of columns). All accumulators, one row of the
// second factor and one number of the first must fit in the registers.
#if defined(KORDER_MATRIX_TILES)
struct Shape {  // of AMX, whose sums are 16 x 16; two side by side
    static constexpr int rows = 16, keys = 128 / KORDER_VECTOR_BYTES, columns = keys;
};
#elif defined(__AVX512F__)
struct Shape {
    static constexpr int rows = 8, keys = 3, columns = 2;
};
#elif defined(__AVX2__)
struct Shape {
    static constexpr int rows = 6, keys = 2, columns = 2;
};
#elif defined(__aarch64__)
struct Shape {
    static constexpr int rows = 8, keys = 2, columns = 2;
};
#else
struct Shape {
    static constexpr int rows = 4, keys = 2, columns = 2;
};
#endif

}  // namespace korder::KORDER_ISA
