// The exact forward: online softmax over tiles of a few rows, outer keys folded into the query, the last mode contracted.
//
// A head's contracted keys are packed a chunk at a time. Threads share a chunk and take blocks of rows, or, when there
// are heads enough, each takes heads of its own. Where a row is not finished by one thread in one chunk its running sums
// are kept between, and joined at the end in a fixed order.
#pragma once

#include "products.hpp"
#include "rows.hpp"
#include "team.hpp"

namespace korder::KORDER_ISA {

constexpr std::int64_t most_kept_rows = 4096;    // whose sums wait for the next chunk
constexpr std::int64_t block_bytes = 256 << 10;  // of packed keys and values, what stays in the cache next to a core

template <class Factor>
struct ForwardPlan {
    typedef typename Summed<Factor>::type Real;
    static constexpr int rows = Shape::rows;
    std::int64_t padded;        // value width in whole vectors
    std::int64_t chunk, block;  // contracted keys
    std::int64_t tiles;         // of rows, in an item
    std::int64_t items;         // blocks of rows of one query head that are worked on at a time
    std::int64_t parts;         // of the first outer mode, at order 1 of a chunk
    int threads;
    bool by_head;

    ForwardPlan(const Call& call, const Shares& shares) : threads(shares.threads), by_head(shares.by_head) {
        constexpr std::int64_t panel = Sizes<Real>::panel;
        padded = rounded(call.value_width, Sizes<Real>::column);
        const std::int64_t length = greater(call.contracted().length, 1);
        const std::int64_t row = (depth_of<Factor>(call.width) + padded) * sizeof(Factor);
        const std::int64_t count = pieces(length, greater(shares.chunk / row / panel, 1) * panel);
        chunk = rounded(pieces(length, count), panel);
        const std::int64_t most = lesser(greater(block_bytes / row / panel, 1) * panel, Sizes<Real>::keys);
        block = rounded(pieces(chunk, pieces(chunk, most)), panel);

        // tiles of an item share a block of keys while it is in the cache, unless outer keys do that already
        tiles = outer_tuples(call) >= 16 ? 1 : 8;
        const std::int64_t enough = by_head ? 1 : 4 * threads;
        while (tiles > 1 && call.share() * pieces(call.queries, tiles * rows) < enough) tiles /= 2;
        items = pieces(call.queries, tiles * rows);
        if (chunk < call.contracted().length)
            items = lesser(items, pieces(kept_rows(shares) / call.share() + 1, tiles * rows));
        parts = 1;
        if (!by_head && call.share() * items < threads) {
            const std::int64_t most = call.outer() ? call.modes[0].length : chunk / panel;
            parts = greater(1, lesser(most, pieces(2 * threads, greater(1, call.share() * items))));
        }
    }

    // Rows of a query head that are worked on at a time: whole tiles, because a tile writes all of its rows.
    std::int64_t slab() const { return items * tiles * rows; }

    static std::int64_t kept_rows(const Shares& shares) { return most_kept_rows * shares.chunk / chunk_bytes; }

    bool keeps(const Call& call) const { return parts > 1 || chunk < call.contracted().length; }
};

// The running softmax of the rows of one item. `taken` sums the weights as products take them, narrowed or not: an output
// is a mean of values by these, whatever the values have in common.
template <class Factor>
struct RowState {
    typedef typename Summed<Factor>::type Real;
    static constexpr bool narrows = sizeof(Factor) < sizeof(Real);
    Weighted<Real> weighted;
    Real* top;
    double *total, *taken;

    RowState(Arena& arena, std::int64_t rows, std::int64_t padded)
        : weighted{arena.take<Real>(rows * padded), arena.take<Real>(rows * padded)},
          top(arena.take<Real>(rows)),
          total(arena.take<double>(rows)),
          taken(narrows ? arena.take<double>(rows) : total) {}

    RowState from(std::int64_t row, std::int64_t padded) const {
        RowState found = *this;
        found.weighted.sums += row * padded, found.weighted.lost += row * padded, found.top += row;
        found.total += row, found.taken += row;
        return found;
    }

    void start(std::int64_t rows, std::int64_t padded) const {
        clear(weighted.sums, rows * padded), clear(weighted.lost, rows * padded);
        clear(top, rows, -Real(__builtin_inff()));
        clear(total, rows, 0.0), clear(taken, rows, 0.0);
    }
};

// What belongs to one head at a time: its packed keys and values, and the rows that are not finished at once.
template <class Factor>
struct HeadMemory {
    Factor *panels, *columns;
    RowState<Factor> kept;

    HeadMemory(Arena& arena, const Call& call, const ForwardPlan<Factor>& plan)
        : panels(arena.take<Factor>(plan.chunk * depth_of<Factor>(call.width))),
          columns(arena.take<Factor>(plan.chunk * plan.padded)),
          kept(arena, plan.keeps(call) ? plan.parts * call.share() * plan.slab() : 0, plan.padded) {}
};

// What belongs to one thread.
template <class Factor>
struct ThreadMemory {
    typedef typename Summed<Factor>::type Real;
    Real* scratch;
    OuterMemory<Real> outer;
    Real* queries;    // tiles of rows, in the order of their factor
    Factor* folded;   // one of them, times outer keys
    Real* scores;     // [rows][pitch]
    Real* extra;      // the same: key masks and biases of the contracted mode
    Factor* weights;  // the same, if they are narrower than scores
    RowState<Factor> state;

    ThreadMemory(Arena& arena, const Call& call, const ForwardPlan<Factor>& plan)
        : scratch(arena.take<Real>(Sizes<Real>::panel * greater(call.width, plan.padded))),
          outer(arena, call),
          queries(arena.take<Real>(plan.tiles * tile_numbers<Factor>(call.width))),
          folded(arena.take<Factor>(folded_numbers<Factor>(call))),
          scores(arena.take<Real>(plan.rows * Sizes<Real>::pitch)),
          extra(arena.take<Real>(plan.rows * Sizes<Real>::pitch)),
          weights(arena.take<Factor>(sizeof(Factor) < sizeof(Real) ? plan.rows * Sizes<Real>::pitch : 0)),
          state(arena, plan.tiles * plan.rows, plan.padded) {}
};

// `Factor` is what products take: numbers as wide as their sums, or bfloat16.
template <class Factor>
class Forward {
public:
    typedef typename Summed<Factor>::type Real;
    static constexpr int rows = Shape::rows;
    static constexpr bool narrows = sizeof(Factor) < sizeof(Real);

    explicit Forward(const Call& call)
        : Forward(call, shares_that_fit(call, 1.0, [&](const Shares& shares) { return Forward(call, shares).bytes(); })) {}

    Forward(const Call& call, const Shares& shares) : call_(call), plan_(call, shares), scales_(call.scale) {
        Arena head(nullptr), thread(nullptr);
        HeadMemory<Factor>(head, call_, plan_);
        ThreadMemory<Factor>(thread, call_, plan_);
        head_bytes_ = head.used(), thread_bytes_ = thread.used();
    }

    std::int64_t bytes() const {
        return (plan_.by_head ? plan_.threads : 1) * head_bytes_ + plan_.threads * thread_bytes_;
    }

    void run(char* memory) const {
        std::int64_t counters[2] = {0, 0};
        const std::int64_t heads = call_.batch * call_.groups;
#pragma omp parallel num_threads(plan_.threads)
        {
            const MatrixTiles registers;
            Team team{omp_get_thread_num(), omp_get_num_threads(), counters};
            Arena head(memory + (plan_.by_head ? team.thread * head_bytes_ : 0));
            Arena thread(memory + (plan_.by_head ? plan_.threads : 1) * head_bytes_ + team.thread * thread_bytes_);
            const HeadMemory<Factor> of_head(head, call_, plan_);
            const ThreadMemory<Factor> mine(thread, call_, plan_);
            mine.outer.start(call_);
            if (plan_.by_head) {
                for (std::int64_t at = team.next(); at < heads; at = team.next())
                    if (!call_.skips(at)) alone(at, of_head, mine);
            } else {
                for (std::int64_t at = 0; at < heads; ++at)
                    if (!call_.skips(at)) attend(at / call_.groups, at % call_.groups, of_head, mine, team);
            }
        }
    }

private:
    struct Item {
        std::int64_t head, row, count, part, kept;
    };

    void alone(std::int64_t at, const HeadMemory<Factor>& head, const ThreadMemory<Factor>& mine) const {
        std::int64_t counters[2] = {0, 0};
        Team team{0, 1, counters};
        attend(at / call_.groups, at % call_.groups, head, mine, team);
    }

    void attend(std::int64_t b, std::int64_t g, const HeadMemory<Factor>& head, const ThreadMemory<Factor>& mine,
                Team& team) const {
        for (std::int64_t slab = 0; slab < call_.queries; slab += plan_.slab()) {
            std::int64_t start = 0;
            do {
                team.meet_again();
                pack(b, g, start, head, mine, team);
                team.meet();
                attend_chunk(b, g, slab, start, head, mine, team);
                start += plan_.chunk;
            } while (start < call_.contracted().length);
            if (!plan_.keeps(call_)) continue;
            team.meet();
            join(b, g, slab, head.kept, team);
        }
    }

    void attend_chunk(std::int64_t b, std::int64_t g, std::int64_t slab, std::int64_t start, const HeadMemory<Factor>& head,
                      const ThreadMemory<Factor>& mine, Team& team) const {
        const std::int64_t items = call_.share() * plan_.items * plan_.parts;
        if (team.count == 1) *team.counters = 0;
        for (std::int64_t at = team.next(); at < items; at = team.next()) {
            const Item item = item_of(g, slab, items - 1 - at);  // under a mask the last ones take longest
            if (item.count > 0) attend_item(b, item, start, head, mine);
        }
    }

    Item item_of(std::int64_t g, std::int64_t slab, std::int64_t index) const {
        const std::int64_t part = index % plan_.parts, block = index / plan_.parts % plan_.items;
        const std::int64_t c = index / plan_.parts / plan_.items, row = block * plan_.tiles * rows;
        return {g * call_.share() + c, slab + row, lesser(plan_.tiles * rows, call_.queries - slab - row), part,
                (part * call_.share() + c) * plan_.slab() + row};
    }

    void pack(std::int64_t b, std::int64_t g, std::int64_t start, const HeadMemory<Factor>& head,
              const ThreadMemory<Factor>& mine, const Team& team) const {
        constexpr std::int64_t panel = Sizes<Real>::panel;
        const Mode& mode = call_.contracted();
        const Rows keys{call_, mode, mode.keys, call_.width, b, g};
        const Rows values{call_, mode, mode.values, call_.value_width, b, g};
        for (std::int64_t p = team.thread * panel; p < plan_.chunk; p += team.count * panel) {
            pack_panel(keys, start + p, mine.scratch, head.panels + p * depth_of<Factor>(call_.width));
            pack_columns(values, start, start + p, start + p + panel, plan_.chunk, mine.scratch, head.columns);
        }
    }

    void attend_item(std::int64_t b, const Item& item, std::int64_t start, const HeadMemory<Factor>& head,
                     const ThreadMemory<Factor>& mine) const {
        RowState<Factor> state = mine.state;
        if (plan_.keeps(call_)) state = head.kept.from(item.kept, plan_.padded);
        if (start == 0) state.start(rounded(item.count, rows), plan_.padded);
        const RowsAt at{b, item.head, item.row, item.count};
        if constexpr (narrows)
            read_rows(call_, at, scales_.rows, mine.queries);
        else
            read_tiles(call_, call_.query, call_.width, at, call_.scale, mine.scratch, mine.queries);
        const Span keys = keys_of(item, lesser(plan_.chunk, call_.contracted().length - start));
        for (std::int64_t first = keys.first; first < keys.last; first += plan_.block)
            for (std::int64_t row = 0; row < item.count; row += rows)
                attend_tile(b, item, row, Span{start + first, start + lesser(keys.last, first + plan_.block)}, start, head,
                            mine, state.from(row, plan_.padded));
        if (plan_.keeps(call_)) return;
        for (std::int64_t r = 0; r < item.count; ++r)
            finish(b, item.head, item.row + r, state.from(r, plan_.padded));
    }

    // The keys of a chunk that are an item's: all of them, unless order 1 has no outer mode to be parted.
    Span keys_of(const Item& item, std::int64_t count) const {
        if (call_.outer() > 0) return Span{0, count};
        const std::int64_t share = rounded(pieces(count, plan_.parts), Sizes<Real>::panel);
        return Span{item.part * share, lesser(count, (item.part + 1) * share)};
    }

    // One tile of rows against one block of contracted keys and every outer tuple.
    void attend_tile(std::int64_t b, const Item& item, std::int64_t row, Span block, std::int64_t start,
                     const HeadMemory<Factor>& head, const ThreadMemory<Factor>& mine, const RowState<Factor>& state) const {
        const std::int64_t count = lesser(rows, item.count - row), i = item.row + row;
        Sight<Shape::rows> sight;
        sight.look(call_, i, count);
        const RowsAt at{b, item.head, i, count};
        OuterWalk<Real, Shape::rows> walk(call_, sight, mine.outer, at);
        const bool extra = make_extra(call_, at, rows, block, mine.extra);
        const Real* queries = mine.queries + row / rows * tile_numbers<Factor>(call_.width);
        const Factor* panels = head.panels + (block.first - start) * depth_of<Factor>(call_.width);
        const Factor* columns = head.columns + (block.first - start) * Sizes<Real>::column;
        const std::int64_t share = pieces(call_.outer() ? call_.modes[0].length : 1, plan_.parts);
        walk.run(Span{item.part * share, (item.part + 1) * share}, [&] {  // at order 1 the one empty tuple
            Span spans[rows];
            const Span whole = walk.spans(block, spans);
            if (whole.first >= whole.last) return;
            const int level = call_.outer();
            const Factor* folded = folded_tile(call_, queries, mine.outer.keys[level], mine.folded);
            const Step step{folded, mine.outer.gate[level], panels, columns, walk.tuple.bias[level],
                            extra ? mine.extra : nullptr, mine.scores, mine.weights, spans, whole};
            if (count == 1)
                absorb<1>(step, state);
            else if (2 * count <= rows)
                absorb<rows / 2>(step, state);
            else
                absorb<rows>(step, state);
        });
    }

    struct Step {
        const Factor* folded;
        const Real* gate;
        const Factor *panels, *columns;
        const Real *bias, *extra;
        Real* scores;
        Factor* weights;
        const Span* spans;
        Span keys;
    };

    template <int Rows>
    void absorb(const Step& step, const RowState<Factor>& state) const {
        constexpr int pitch = Sizes<Real>::pitch, width = Vector<Real>::width;
        constexpr int lanes = width > Sizes<Real>::lanes ? width : Sizes<Real>::lanes;
        const auto [first, last] = step.keys;
        scores_of<Rows>(call_, scales_.scores, step.folded, step.panels, first, last, step.scores);
        Real rescale[lanes] = {}, reference[lanes] = {};
        for (int r = 0; r < Rows; ++r) {
            Real* scores = step.scores + r * pitch;
            if (step.extra) add_row(scores, step.extra + r * pitch, first, last);
            close_outside(scores, first, last, step.spans[r]);
            const Real largest = largest_in(scores, first, last) + step.bias[r], before = state.top[r];
            const Real top = largest > before ? largest : before;
            const bool empty = top == -Real(__builtin_inff());
            rescale[r] = empty ? Real(0) : before - top;
            reference[r] = empty ? Real(0) : top - step.bias[r];
            state.top[r] = top;
        }
        for (int r = 0; r < lanes; r += width) store(rescale + r, exponential<Real>(load(rescale + r)));
        for (int r = 0; r < Rows; ++r) {
            Real* scores = step.scores + r * pitch;
            const Real sum = exponentiate(scores, first, last, reference[r]);
            state.total[r] = state.total[r] * rescale[r] + sum;
            if constexpr (narrows)
                state.taken[r] = state.taken[r] * rescale[r] + (sum - narrow_row(scores, first, last, step.weights + r * pitch));
        }
        if (step.gate)
            add_weighted<Rows, true>(step, rescale, state.weighted);
        else
            add_weighted<Rows, false>(step, rescale, state.weighted);
    }

    template <int Rows, bool Gated>
    void add_weighted(const Step& step, const Real* rescale, const Weighted<Real>& weighted) const {
        const auto [first, last] = step.keys;
        const Factor* weights = step.weights;
        if constexpr (!narrows) weights = step.scores;
        values_of<Rows, Gated>(weights, step.columns, plan_.chunk, plan_.padded, first, last, rescale, step.gate, weighted);
    }

    void finish(std::int64_t b, std::int64_t h, std::int64_t i, const RowState<Factor>& state) const {
        const std::int64_t row = (b * call_.heads + h) * call_.queries + i;
        Real* output = static_cast<Real*>(call_.output) + row * call_.value_width;
        Real* lse = static_cast<Real*>(call_.lse) + row;
        if (!(*state.total > 0)) {
            clear(output, call_.value_width);
            *lse = -Real(__builtin_inff());
            return;
        }
        const double share = 1 / *state.taken;
        for (std::int64_t c = 0; c < call_.value_width; ++c) output[c] = Real(state.weighted.sums[c] * share);
        *lse = Real(double(*state.top) + __builtin_log(*state.total));
    }

    // Joins the parts of every row of a slab, and finishes it.
    void join(std::int64_t b, std::int64_t g, std::int64_t slab, const RowState<Factor>& kept, const Team& team) const {
        const std::int64_t size = lesser(plan_.slab(), call_.queries - slab);
        for (std::int64_t at = team.thread; at < call_.share() * size; at += team.count) {
            const std::int64_t c = at / size, i = at % size;
            const RowState<Factor> whole = kept.from(c * plan_.slab() + i, plan_.padded);
            for (std::int64_t part = 1; part < plan_.parts; ++part)
                merge(whole, kept.from((part * call_.share() + c) * plan_.slab() + i, plan_.padded));
            finish(b, g * call_.share() + c, slab + i, whole);
        }
    }

    void merge(const RowState<Factor>& into, const RowState<Factor>& other) const {
        if (!(*other.total > 0)) return;
        const Real top = *into.top > *other.top ? *into.top : *other.top;
        const double left = *into.total > 0 ? __builtin_exp(double(*into.top) - double(top)) : 0;
        const double right = __builtin_exp(double(*other.top) - double(top));
        for (std::int64_t c = 0; c < plan_.padded; ++c)
            into.weighted.sums[c] = Real(left * double(into.weighted.sums[c]) + right * double(other.weighted.sums[c]));
        *into.total = left * *into.total + right * *other.total;
        if constexpr (narrows) *into.taken = left * *into.taken + right * *other.taken;
        *into.top = top;
    }

    const Call call_;
    const ForwardPlan<Factor> plan_;
    const Scales scales_;
    std::int64_t head_bytes_ = 0, thread_bytes_ = 0;
};

}  // namespace korder::KORDER_ISA
