// Exponentials in registers: the nearest power of two becomes the exponent, a polynomial does the rest.
//
// The polynomials are minimax in relative error for e^f, |f| <= ln(2)/2 (1.9e-9 and 3.1e-18); ours, by Remez.
#pragma once

#include "vector.hpp"

namespace korder::KORDER_ISA {

template <class Real>
struct Exponential;

template <>
struct Exponential<float> {
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float shifter = 12582912.0f + bias;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float lowest = -88.029691f;          // -bias * ln(2)
    static constexpr float log2_e = 1.44269504088896340736f, ln_2 = 0.693147180559945309417f;
    static constexpr int terms = 7;
    static constexpr float coefficients[terms] = {1.0f,
                                                  1.0f,
                                                  4.999999207121428087e-1f,
                                                  1.666642018471259906e-1f,
                                                  4.166822734023350745e-2f,
                                                  8.374815148051390130e-3f,
                                                  1.383675681799608714e-3f};
};

template <>
struct Exponential<double> {
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double shifter = 6755399441055744.0 + bias;  // 1.5 * 2^52
    static constexpr double lowest = -709.08956571282405;
    static constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.693147180559945309417;
    static constexpr int terms = 12;
    static constexpr double coefficients[terms] = {
        1.0,
        1.0,
        5.000000000000017687e-1,
        1.666666666666616894e-1,
        4.166666666649276134e-2,
        8.333333333559189775e-3,
        1.388888895122566290e-3,
        1.984126943279940482e-4,
        2.480148651954275370e-5,
        2.755762243995699661e-6,
        2.763229399624228512e-7,
        2.499433256403836245e-8};
};

// e^x for x up to a little above 0; exactly 0 where it is below the normal numbers, -inf included. NaN is not kept:
// callers have none.
template <class Real>
KORDER_INLINE vec<Real> exponential(vec<Real> x) {
    using E = Exponential<Real>;
    x = larger<Real>(x, spread<Real>(E::lowest));
    const vec<Real> shifted = x * E::log2_e + E::shifter;  // its low bits are the biased exponent
    const vec<Real> fraction = x - (shifted - E::shifter) * E::ln_2;
    vec<Real> power = spread<Real>(E::coefficients[E::terms - 1]);
#pragma GCC unroll 12
    for (int i = E::terms - 2; i >= 0; --i) power = power * fraction + E::coefficients[i];
    using Bits = typename Vector<Real>::bits;
    const Bits exponent = reinterpret_cast<Bits>(shifted) << E::mantissa;
    return power * reinterpret_cast<vec<Real>>(exponent);
}

}  // namespace korder::KORDER_ISA
