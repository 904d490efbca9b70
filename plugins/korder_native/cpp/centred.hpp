// Polynomials of x - centre in powers of x: what a row multiplies each power with, and means of centred powers.
#pragma once

#include "features.hpp"

namespace korder::KORDER_ISA {

// Binomial coefficients of one power times powers of a shift, from the highest down: C(m, s) shift^(m - s), s = m, m - 1, ..
struct Binomials {
    double value;
    std::int64_t m, s;

    // 1 is made of the shift, so that one that is no number stays none in every power
    Binomials(std::int64_t power, double shift) : value(shift * 0.0 + 1.0), m(power), s(power) {}

    KORDER_INLINE void next(double shift) {
        value = value * double(s) / double(m - s + 1) * shift;
        --s;
    }
};

// shares[s * step] = factor_s * the coefficient of x^s in the sum over m of c_m (x - centre)^m.
inline void centred_shares(const Finish& finish, std::int64_t degree, double centre, double* shares, std::int64_t step) {
    for (std::int64_t m = 0; m <= degree; ++m) {
        shares[m * step] = 0.0;
        for (Binomials b(m, centre); b.s >= 0; b.next(-centre)) shares[b.s * step] += finish.coefficients[m] * b.value;
    }
    for (std::int64_t s = 0; s <= degree; ++s) shares[s * step] *= finish.factors[s];
}

// Writes the means of (x - centre)^m, given those of x^s; returns the sum of |c_m| times the same of absolute terms.
inline double centred_moments(const Finish& finish, std::int64_t degree, double centre, const double* powers,
                              const double* sizes, std::int64_t step, double* moments) {
    double magnitude = 0.0;
    for (std::int64_t m = 0; m <= degree; ++m) {
        double moment = 0.0, size = 0.0;
        for (Binomials b(m, centre); b.s >= 0; b.next(-centre)) {
            moment += b.value * powers[b.s * step] * finish.factors[b.s];
            size += __builtin_fabs(b.value) * sizes[b.s * step] * finish.size_factors[b.s];
        }
        moments[m] = moment;
        magnitude += __builtin_fabs(finish.coefficients[m]) * size;
    }
    return magnitude;
}

// Writes a row, given its sums over features, `step` apart, in every channel, and by degree in the last one and of absolute
// terms: every channel over the last one, that itself, moments and magnitude; zeros in a dead row.
inline void finish_row(const Finish& finish, std::int64_t degree, std::int64_t channels, std::int64_t row, const double* totals,
                       const double* last, const double* sizes, std::int64_t step, double* sums) {
    double *to = sums + row * channels, *moments = finish.moments + row * (degree + 1);
    if (!finish.live[row]) {
        clear(to, channels), clear(moments, degree + 1);
        finish.magnitude[row] = 0.0;
        return;
    }
    const double mean = totals[(channels - 1) * step];
    for (std::int64_t c = 0; c + 1 < channels; ++c) to[c] = totals[c * step] / mean;
    to[channels - 1] = mean;
    finish.magnitude[row] = centred_moments(finish, degree, finish.centres[row], last, sizes, step, moments) / mean;
}

}  // namespace korder::KORDER_ISA
