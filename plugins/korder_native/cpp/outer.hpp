// Walks the tuples of outer keys that some row of a tile sees, with those keys folded into the queries, and the outer
// values multiplied into a gate, one mode at a time.
#pragma once

#include "arena.hpp"
#include "pack.hpp"
#include "sight.hpp"

namespace korder::KORDER_ISA {

// What a walk keeps at each of its levels; level 0 is before any outer key.
template <class Real>
struct OuterMemory {
    Real* folded[max_order];  // [width][lanes], queries times keys
    Real* gate[max_order];    // [padded value width], product of values; none at level 0
    Real* key[max_order];     // the rows of the level's own key and value
    Real* value[max_order];

    OuterMemory(Arena& arena, const Call& call) {
        constexpr int lanes = Sizes<Real>::lanes, column = Sizes<Real>::column;
        for (int t = 0; t < call.order; ++t) {
            folded[t] = arena.take<Real>(call.width * lanes);
            gate[t] = t ? arena.take<Real>(rounded(call.value_width, column)) : nullptr;
            key[t] = t ? arena.take<Real>(rounded(call.width, column)) : nullptr;
            value[t] = t ? arena.take<Real>(rounded(call.value_width, column)) : nullptr;
        }
    }
};

// One tuple of outer keys for one tile of rows.
template <class Real>
struct OuterTuple {
    std::int64_t keys[max_order];
    bool live[max_order][Shape::rows];
    Real bias[max_order][Shape::rows];  // of the outer keys so far, in units of the exponent
};

template <class Real>
class OuterWalk {
public:
    OuterTuple<Real> tuple;

    OuterWalk(const Call& call, const Sight<Shape::rows>& sight, const OuterMemory<Real>& memory, std::int64_t b,
              std::int64_t h, std::int64_t row)
        : call_(call), sight_(sight), memory_(memory), b_(b), h_(h), g_(h / call.share()), row_(row) {
        for (int r = 0; r < Shape::rows; ++r) tuple.live[0][r] = true, tuple.bias[0][r] = Real(0);
    }

    // Calls `leaf` for every live tuple whose first outer key is in `part`.
    template <class Leaf>
    void run(Span part, Leaf&& leaf) {
        descend<0>(part, leaf);
    }

private:
    template <int Level, class Leaf>
    void descend(Span part, Leaf& leaf) {
        if constexpr (Level < max_order - 1) {
            if (Level < call_.outer()) {
                const Span seen = after_outer(call_, Level, tuple.keys, sight_.seen(Level, tuple.live[Level]));
                const std::int64_t last = lesser(seen.last, part.last);
                for (std::int64_t j = greater(seen.first, part.first); j < last; ++j)
                    if (enter(Level, j)) descend<Level + 1>(Span{0, INT64_MAX}, leaf);
                return;
            }
        }
        leaf();
    }

    // Takes key j of a mode into the tuple; false if no row sees it.
    bool enter(int t, std::int64_t j) {
        const Mode& mode = call_.modes[t];
        if (!is_open(mode, b_, g_, j)) return false;
        bool any = false;
        for (int r = 0; r < Shape::rows; ++r) {
            const Span span = sight_.spans[t][r];
            bool live = tuple.live[t][r] && span.first <= j && j < span.last;
            Real bias = tuple.bias[t][r];
            if (live && mode.bias.data) {
                bias += bias_at<Real>(call_, mode, b_, h_, row_ + r, j, log2_e);
                live = bias != -Real(__builtin_inff());
            }
            tuple.live[t + 1][r] = live;
            tuple.bias[t + 1][r] = live ? bias : Real(0);
            any |= live;
        }
        if (!any) return false;
        tuple.keys[t] = j;
        fold(t, j);
        return true;
    }

    void fold(int t, std::int64_t j) {
        constexpr int lanes = Sizes<Real>::lanes;
        const Mode& mode = call_.modes[t];
        Real *key = memory_.key[t + 1], *value = memory_.value[t + 1], *gate = memory_.gate[t + 1];
        read_row(call_.number, mode.keys, place(mode.keys, b_, g_, j), call_.width, key);
        read_row(call_.number, mode.values, place(mode.values, b_, g_, j), call_.value_width, value);
        const Real* before = memory_.folded[t];
        Real* to = memory_.folded[t + 1];
        for (std::int64_t l = 0; l < call_.width; ++l)
            for (int r = 0; r < lanes; ++r) to[l * lanes + r] = before[l * lanes + r] * key[l];
        const Real* outer = memory_.gate[t];
        for (std::int64_t c = 0; c < call_.value_width; ++c) gate[c] = t ? outer[c] * value[c] : value[c];
    }

    const Call& call_;
    const Sight<Shape::rows>& sight_;
    const OuterMemory<Real>& memory_;
    std::int64_t b_, h_, g_, row_;
};

}  // namespace korder::KORDER_ISA
