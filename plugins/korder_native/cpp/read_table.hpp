// The table that rows read, out of the modes' key states.
#pragma once

#include <cfloat>

#include "monomials.hpp"
#include "vector.hpp"

namespace korder::KORDER_ISA {

// Means of some number of states, (count, channels) each, multiplied with one another and with every monomial's weight.
struct MeanProducts {
    const TableCall& call;
    const double* const* states;
    std::int64_t channels;
    double shares[max_order];  // one over the sums of weights

    MeanProducts(const TableCall& from, const double* const* of, std::int64_t width)
        : call(from), states(of), channels(width) {
        for (int t = 0; t < call.order; ++t) {
            const double count = call.sums[t][call.channels - 1];
            shares[t] = 1.0 / (count == 0.0 ? 1.0 : count);
        }
    }

    KORDER_INLINE double at(std::int64_t a, std::int64_t c) const {
        double product = call.weights[a];
        for (int t = 0; t < call.order; ++t) product *= states[t][a * channels + c] * shares[t];
        return product;
    }

    // Writes the monomials [first, last) over their largest finite entry, which is returned; 1 if there is none but 0.
    template <class Real>
    double write(std::int64_t first, std::int64_t last, Real* to) const {
        double largest = 0.0;
        for (std::int64_t a = first; a < last; ++a)
            for (std::int64_t c = 0; c < channels; ++c) {
                const double size = __builtin_fabs(at(a, c));
                largest = size > largest && size <= DBL_MAX ? size : largest;
            }
        if (largest == 0.0) largest = 1.0;
        for (std::int64_t a = first; a < last; ++a)
            for (std::int64_t c = 0; c < channels; ++c) to[a * channels + c] = Real(at(a, c) / largest);
        return largest;
    }
};

template <class Real>
void read_table_of(const Monomials& table, const TableCall& call) {
    const MeanProducts values(call, call.sums, call.channels), sizes(call, call.absolute, 1);
    double sign = 1.0;
    for (std::int64_t s = 0; s <= table.degree; ++s, sign *= call.sign) {
        const std::int64_t first = table.offsets[s], last = table.offsets[s + 1];
        call.factors[s] = sign * values.write(first, last, static_cast<Real*>(call.values));
        call.size_factors[s] = sizes.write(first, last, static_cast<Real*>(call.sizes));
    }
}

inline void read_table(const Monomials& table, bool wide, const TableCall& call) {
    wide ? read_table_of<double>(table, call) : read_table_of<float>(table, call);
}

}  // namespace korder::KORDER_ISA
