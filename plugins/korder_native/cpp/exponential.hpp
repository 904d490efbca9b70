// Powers of two in registers: the nearest integer becomes the exponent, a polynomial does the rest.
//
// The polynomials are minimax in relative error for 2^f, |f| <= 1/2 (errors 7.5e-8 and 3.1e-18); ours, by Remez.
#pragma once

#include "vector.hpp"

namespace korder::KORDER_ISA {

template <class Real>
struct Powers;

template <>
struct Powers<float> {
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr int terms = 6;
    static constexpr float coefficients[terms] = {1.00000007165704452028e+00f, 6.93146967151473503144e-01f,
                                                  2.40221197277508097256e-01f, 5.55071310969809522673e-02f,
                                                  9.67554125893561010885e-03f, 1.32765244295355959447e-03f};
};

template <>
struct Powers<double> {
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int terms = 12;
    static constexpr double coefficients[terms] = {
        1.00000000000000000000e+00, 6.93147180559945286227e-01, 2.40226506959101554495e-01, 5.55041086648199247233e-02,
        9.61812910758833364278e-03, 1.33335581467898208786e-03, 1.54035304625164704570e-04, 1.52527334900531824765e-05,
        1.32154330885903640605e-06, 1.01781979997496698045e-07, 7.07410580974814401277e-09, 4.43528585633413576266e-10};
};

// 2^x for x <= about 0.5; exactly 0 from x = -bias + 1/2 down, -inf included. NaN is not kept: callers have none.
template <class Real>
KORDER_INLINE vec<Real> power_of_two(vec<Real> x) {
    using P = Powers<Real>;
    x = larger<Real>(x, spread<Real>(Real(-P::bias)));
    const vec<Real> shifted = x + (P::shifter + Real(P::bias));  // its low bits are the biased exponent
    const vec<Real> fraction = x - (shifted - (P::shifter + Real(P::bias)));
    vec<Real> power = spread<Real>(P::coefficients[P::terms - 1]);
#pragma GCC unroll 12
    for (int i = P::terms - 2; i >= 0; --i) power = power * fraction + P::coefficients[i];
    using Bits = typename Vector<Real>::bits;
    const Bits exponent = reinterpret_cast<Bits>(shifted) << P::mantissa;
    return power * reinterpret_cast<vec<Real>>(exponent);
}

}  // namespace korder::KORDER_ISA
