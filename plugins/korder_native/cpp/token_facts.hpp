// What is measured of tokens before their features are made: each column's largest number and sum, and inner products.
#pragma once

#include <cfloat>

#include "features.hpp"

namespace korder::KORDER_ISA {

// peaks: the largest finite magnitudes; totals: sums of open tokens times weights. Both (width), written.
inline void column_facts(const FeatureCall& call, const double* weights, double* peaks, double* totals, double* token) {
    const TokenColumns& from = call.columns;
    const std::int64_t width = call.monomials->width;
    clear(peaks, width), clear(totals, width);
    for (std::int64_t j = 0; j < call.tokens; ++j) {
        if (from.open && !from.open[j]) continue;
        read_row(from.number, from.rows, j * from.rows.row, width, token);
        const double weight = weights ? weights[j] : 1.0;
        for (std::int64_t l = 0; l < width; ++l) {
            const double size = __builtin_fabs(token[l]);
            peaks[l] = size > peaks[l] && size <= __DBL_MAX__ ? size : peaks[l];
            totals[l] += token[l] * weight;
        }
    }
}

// to[i] = the sum over columns of token i times `factors`.
inline void token_products(const FeatureCall& call, const double* factors, double* to, double* token) {
    const TokenColumns& from = call.columns;
    const std::int64_t width = call.monomials->width;
    for (std::int64_t j = 0; j < call.tokens; ++j) {
        read_row(from.number, from.rows, j * from.rows.row, width, token);
        double sum = 0.0;
        for (std::int64_t l = 0; l < width; ++l) sum += token[l] * factors[l];
        to[j] = sum;
    }
}

}  // namespace korder::KORDER_ISA
