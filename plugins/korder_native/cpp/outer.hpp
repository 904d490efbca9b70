// Walks the tuples of outer keys that some row sees, with the products of their keys and of their values.
#pragma once

#include "arena.hpp"
#include "pack.hpp"
#include "sight.hpp"

namespace korder::KORDER_ISA {

// What a walk keeps at each of its levels; level 0 is before any outer key, and has nothing.
template <class Real>
struct OuterMemory {
    Real *key[max_order], *value[max_order];  // rows of the level's own key and value
    Real *keys[max_order], *gate[max_order];  // products of those so far, in whole vectors, zeros at the end

    OuterMemory(Arena& arena, const Call& call) {
        const std::int64_t width = rounded(call.width, Sizes<Real>::column);
        const std::int64_t value_width = rounded(call.value_width, Sizes<Real>::column);
        key[0] = value[0] = keys[0] = gate[0] = nullptr;
        for (int t = 1; t < call.order; ++t) {
            key[t] = arena.take<Real>(width), value[t] = arena.take<Real>(value_width);
            // the products with the first mode are its rows
            keys[t] = t == 1 ? key[t] : arena.take<Real>(width);
            gate[t] = t == 1 ? value[t] : arena.take<Real>(value_width);
        }
    }

    // The arena's memory may hold anything, and a gate of NaN would not be a gate of nothing.
    void start(const Call& call) const {
        const std::int64_t width = rounded(call.width, Sizes<Real>::column);
        const std::int64_t value_width = rounded(call.value_width, Sizes<Real>::column);
        for (int t = 1; t < call.order; ++t) {
            clear(key[t], width), clear(keys[t], width);
            clear(value[t], value_width), clear(gate[t], value_width);
        }
    }
};

// A tuple of outer keys, and which of `Count` rows see all of it; the arrays of levels as in `OuterMemory`.
template <class Real, int Count>
struct OuterTuple {
    std::int64_t keys[max_order];
    bool live[max_order][Count];
    Real bias[max_order][Count];  // of the outer keys so far, in units of scores
};

// The query head and the first row of the rows that walk, and how many they are.
struct RowsAt {
    std::int64_t b, h, row, count;
};

template <class Real, int Count>
class OuterWalk {
public:
    OuterTuple<Real, Count> tuple;

    OuterWalk(const Call& call, const Sight<Count>& sight, const OuterMemory<Real>& memory, const RowsAt& at)
        : call_(call), sight_(sight), memory_(memory), at_(at), g_(at.h / call.share()) {
        for (int r = 0; r < Count; ++r) tuple.live[0][r] = r < at.count, tuple.bias[0][r] = Real(0);
    }

    // Calls `leaf` for every live tuple whose first outer key is in `part`.
    template <class Leaf>
    void run(Span part, Leaf&& leaf) {
        descend<0>(part, leaf);
    }

    // The contracted keys that every row sees with this tuple, counted from the start of `block`; returned is the range
    // of whole panels that holds them.
    Span spans(Span block, Span* found) const {
        const int level = call_.outer();
        const Span chain = between_outer(call_, tuple.keys);
        Span whole{INT64_MAX, 0};
        for (int r = 0; r < Count; ++r) {
            const Span seen = sight_.spans[level][r];
            Span span{greater(greater(seen.first, chain.first), block.first) - block.first,
                      lesser(lesser(seen.last, chain.last), block.last) - block.first};
            if (!tuple.live[level][r] || span.first >= span.last) span = Span{0, 0};
            found[r] = span;
            if (span.last == 0) continue;
            whole.first = lesser(whole.first, span.first), whole.last = greater(whole.last, span.last);
        }
        return in_panels(whole);
    }

    static Span in_panels(Span span) {
        if (span.first >= span.last) return Span{0, 0};
        return Span{span.first / Sizes<Real>::panel * Sizes<Real>::panel, rounded(span.last, Sizes<Real>::panel)};
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
        if (!is_open(mode, at_.b, g_, j)) return false;
        bool any = false;
        for (int r = 0; r < Count; ++r) {
            const Span span = sight_.spans[t][r];
            bool live = tuple.live[t][r] && span.first <= j && j < span.last;
            Real bias = tuple.bias[t][r];
            if (live && mode.bias.data) {
                bias += bias_at<Real>(call_, mode, at_.b, at_.h, at_.row + r, j);
                live = bias != -Real(__builtin_inff());
            }
            tuple.live[t + 1][r] = live;
            tuple.bias[t + 1][r] = live ? bias : Real(0);
            any |= live;
        }
        if (!any) return false;
        tuple.keys[t] = j;
        const int level = t + 1;
        read_row(call_.number, mode.keys, place(mode.keys, at_.b, g_, j), call_.width, memory_.key[level]);
        read_row(call_.number, mode.values, place(mode.values, at_.b, g_, j), call_.value_width, memory_.value[level]);
        if (t > 0) {
            multiply_rows(memory_.keys[t], memory_.key[level], call_.width, memory_.keys[level]);
            multiply_rows(memory_.gate[t], memory_.value[level], call_.value_width, memory_.gate[level]);
        }
        return true;
    }

    static void multiply_rows(const Real* left, const Real* right, std::int64_t count, Real* to) {
        for (std::int64_t c = 0; c < count; ++c) to[c] = left[c] * right[c];
    }

    const Call& call_;
    const Sight<Count>& sight_;
    const OuterMemory<Real>& memory_;
    const RowsAt at_;
    const std::int64_t g_;
};

// Rows of a tile, [width][lanes], times the products of outer keys; at order 1 the rows themselves.
template <class Real>
KORDER_INLINE const Real* fold_tile(const Real* rows, const Real* keys, std::int64_t width, Real* to) {
    constexpr int lanes = Sizes<Real>::lanes;
    if (!keys) return rows;
    for (std::int64_t l = 0; l < width; ++l)
        for (int r = 0; r < lanes; ++r) to[l * lanes + r] = rows[l * lanes + r] * keys[l];
    return to;
}

}  // namespace korder::KORDER_ISA
