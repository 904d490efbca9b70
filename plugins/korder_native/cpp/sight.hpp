// Which keys the rows of a tile may see: a range for every row and mode, and what an ordered mask adds to it.
#pragma once

#include "reading.hpp"

namespace korder::KORDER_ISA {

struct Span {
    std::int64_t first, last;  // the key after the last one
};

// The ranges of one tile of rows; a row that is not there sees nothing.
template <int Rows>
struct Sight {
    Span spans[max_order][Rows];

    void look(const Call& call, std::int64_t row, std::int64_t count) {
        for (int t = 0; t < call.order; ++t)
            for (int r = 0; r < Rows; ++r)
                spans[t][r] = r < count ? span_of(call, t, row + r + call.query_offset) : Span{0, 0};
    }

    static Span span_of(const Call& call, int t, std::int64_t position) {
        const Mode& mode = call.modes[t];
        Span span{0, mode.length};
        if (call.kind == Kind::causal || call.kind == Kind::window || ends_the_chain(call, t))
            span.last = lesser(span.last, position - mode.offset + 1);
        if (call.kind == Kind::window) span.first = greater(0, position - mode.offset + 1 - mode.window);
        return span.first < span.last ? span : Span{0, 0};
    }

    // Of ordered positions only the last mode's is held against the query's.
    static bool ends_the_chain(const Call& call, int t) {
        const int last = call.before == call.outer() ? call.order - 1 : call.order - 2;
        return call.kind == Kind::ordered && t == last;
    }

    // The keys of a mode that some live row sees.
    Span seen(int t, const bool* live) const {
        Span whole{INT64_MAX, 0};
        for (int r = 0; r < Rows; ++r) {
            if (!live[r] || spans[t][r].first >= spans[t][r].last) continue;
            whole.first = lesser(whole.first, spans[t][r].first);
            whole.last = greater(whole.last, spans[t][r].last);
        }
        return whole;
    }
};

// The keys of outer mode t that an ordered chain allows after the key `at` of the outer mode before it.
KORDER_INLINE Span after_outer(const Call& call, int t, const std::int64_t* chosen, Span span) {
    if (call.kind == Kind::ordered && t > 0)
        span.first = greater(span.first, chosen[t - 1] + call.modes[t - 1].offset + 1 - call.modes[t].offset);
    return span;
}

// The contracted keys that an ordered chain allows between its outer neighbours.
KORDER_INLINE Span between_outer(const Call& call, const std::int64_t* chosen) {
    Span span{0, call.contracted().length};
    if (call.kind != Kind::ordered) return span;
    const int t = call.before;
    const std::int64_t offset = call.contracted().offset;
    if (t > 0) span.first = greater(0, chosen[t - 1] + call.modes[t - 1].offset + 1 - offset);
    if (t >= 0 && t < call.outer()) span.last = lesser(span.last, chosen[t] + call.modes[t].offset - offset);
    return span;
}

}  // namespace korder::KORDER_ISA
