// The two products of a tile, in the dtype that they are summed in or in bfloat16.
#pragma once

#if defined(KORDER_MATRIX_TILES)
#include "matrix_tiles.hpp"
#else
#include "pair_products.hpp"
#endif

namespace korder::KORDER_ISA {

// Scores by products of either kind; in float32 and float64 the scale is in the folded rows.
template <int Rows, class Real>
KORDER_INLINE void scores_of(const Call& call, float, const Real* folded, const Real* panels, std::int64_t first,
                             std::int64_t last, Real* scores) {
    tile_scores<Real, Rows>(folded, panels, call.width, first, last, scores);
}

template <int Rows>
KORDER_INLINE void scores_of(const Call& call, float scale, const BFloat16* folded, const BFloat16* panels,
                             std::int64_t first, std::int64_t last, float* scores) {
    switch (call.order) {
        case 1: return pair_scores<Rows, 1>(folded, panels, call.width, scale, first, last, scores);
        case 2: return pair_scores<Rows, 2>(folded, panels, call.width, scale, first, last, scores);
        default: return pair_scores<Rows, most_terms>(folded, panels, call.width, scale, first, last, scores);
    }
}

// The weighted values by products of either kind.
template <int Rows, bool Gated, class Real>
KORDER_INLINE void values_of(const Real* weights, const Real* columns, std::int64_t room, std::int64_t padded,
                             std::int64_t first, std::int64_t last, const Real* rescale, const Real* gate,
                             const Weighted<Real>& weighted) {
    tile_values<Real, Rows, Gated>(weights, columns, room, padded, first, last, rescale, gate, weighted);
}

template <int Rows, bool Gated>
KORDER_INLINE void values_of(const BFloat16* weights, const BFloat16* columns, std::int64_t room, std::int64_t padded,
                             std::int64_t first, std::int64_t last, const float* rescale, const float* gate,
                             const Weighted<float>& weighted) {
    pair_values<Rows, Gated>(weights, columns, room, padded, first, last, rescale, gate, weighted);
}

}  // namespace korder::KORDER_ISA
