// The exact backward: scores again from lse, five products, nothing of the size of the scores kept.
//
// A block of rows meets a block of contracted keys under every outer tuple while both stay near the core. Weights P and
// score gradients D of the block are held; from them come, per tile of rows, D K, which scatters into the gradients of
// queries and outer keys, and, per block, the sums over rows D^T Q for the contracted keys and P^T G for the contracted and
// for the outer values. Blocks of rows go to threads by a fixed rule; where there are fewer of them than threads, each is
// parted by outer keys, at order 1 by the contracted ones.
#pragma once

#include "gradient_sums.hpp"
#include "gradient_tile.hpp"

namespace korder::KORDER_ISA {

constexpr std::int64_t backward_block_bytes = 256 << 10;  // packed keys and values and their gradients, near a core

template <class Real>
struct BackwardPlan {
    static constexpr int rows = Shape::rows, most_tiles = 8, most_rows = rows * most_tiles;
    std::int64_t width, value_width;  // in whole vectors
    std::int64_t chunk, block;        // contracted keys
    std::int64_t tiles;               // of rows, in a block
    std::int64_t items, parts;        // blocks of rows of a query head, and parts of each
    std::int64_t together;            // items in a row that one thread takes, because they add to the same biases
    int threads;
    bool by_head;

    BackwardPlan(const Call& call, const Shares& shares) : threads(shares.threads), by_head(shares.by_head) {
        constexpr std::int64_t panel = Sizes<Real>::panel;
        width = rounded(call.width, Sizes<Real>::column), value_width = rounded(call.value_width, Sizes<Real>::column);
        const std::int64_t length = greater(call.contracted().length, 1);
        const std::int64_t row = (call.width + call.value_width + width + value_width) * sizeof(Real);
        chunk = rounded(pieces(length, pieces(length, greater(shares.chunk / row / panel, 1) * panel)), panel);
        const std::int64_t most = greater(backward_block_bytes / (2 * row) / panel, 1) * panel;
        block = rounded(pieces(chunk, pieces(chunk, lesser(most, Sizes<Real>::keys))), panel);
        if (threads > 1) by_head = by_head && !shares_bias_rows(call, true);
        together = shares_bias_rows(call, false) ? call.share() : 1;
        share_rows(call);
    }

private:
    // Rows a block: many, for the sums over rows, but such that all threads get the same.
    void share_rows(const Call& call) {
        const std::int64_t all = greater(1, pieces(call.queries, rows)), most = lesser(most_tiles, all);
        const std::int64_t blocks = call.share() / together * pieces(all, most);
        const std::int64_t divisible = call.outer() ? call.modes[0].length : chunk / Sizes<Real>::panel;
        tiles = pieces(all, pieces(all, most)), parts = 1;
        if (!by_head && blocks < threads && divisible >= threads)
            parts = lesser(divisible, 2 * threads);
        else if (!by_head)
            tiles = even_tiles(call, all, most);
        items = pieces(call.queries, tiles * rows);
    }

    std::int64_t even_tiles(const Call& call, std::int64_t all, std::int64_t most) const {
        std::int64_t best = most, least = INT64_MAX;
        for (std::int64_t size = most; size >= pieces(most, 2); --size) {
            const std::int64_t longest = pieces(call.share() / together * pieces(all, size), threads) * size;
            if (longest < least) best = size, least = longest;
        }
        return best;
    }

    // Whether heads, or else query heads of one key head, add to the same biases of queries and keys.
    static bool shares_bias_rows(const Call& call, bool any) {
        for (int t = 0; t < call.order; ++t) {
            if (!call.bias_gradient[t] || !call.modes[t].by_row) continue;
            if (call.share() > 1 && !call.bias_head[t]) return true;
            if (any && ((call.batch > 1 && !call.bias_batch[t]) || (call.heads > 1 && !call.bias_head[t]))) return true;
        }
        return false;
    }
};

// Packed keys and values, as second factors of products over columns and over keys.
template <class Real>
struct BackwardHead {
    Real *key_panels, *value_panels, *key_columns, *value_columns;

    BackwardHead(Arena& arena, const Call& call, const BackwardPlan<Real>& plan)
        : key_panels(arena.take<Real>(plan.chunk * call.width)),
          value_panels(arena.take<Real>(plan.chunk * call.value_width)),
          key_columns(arena.take<Real>(plan.chunk * plan.width)),
          value_columns(arena.take<Real>(plan.chunk * plan.value_width)) {}
};

template <class Real>
class Backward {
public:
    static constexpr int rows = Shape::rows, most_rows = BackwardPlan<Real>::most_rows;

    explicit Backward(const Call& call)
        : Backward(call, shares_that_fit(call, 3.0, [&](const Shares& shares) { return Backward(call, shares).bytes(); })) {}

    Backward(const Call& call, const Shares& shares) : call_(call), plan_(call, shares) {
        Arena head(nullptr), thread(nullptr), sums(nullptr);
        BackwardHead<Real>(head, call_, plan_);
        GradientSums<Real>(sums, call_, plan_.chunk, plan_.parts > 1);
        lay_out(thread);
        head_bytes_ = head.used(), thread_bytes_ = thread.used(), sums_bytes_ = sums.used();
    }

    std::int64_t bytes() const {
        if (plan_.by_head) return plan_.threads * (head_bytes_ + thread_bytes_);
        return head_bytes_ + plan_.threads * thread_bytes_ + (plan_.threads - 1) * sums_bytes_;
    }

    void run(char* memory) const {
        std::int64_t counters[2] = {0, 0};
        const std::int64_t heads = call_.batch * call_.groups;
        char* of_threads = memory + (plan_.by_head ? plan_.threads : 1) * head_bytes_;
        char* of_sums = of_threads + plan_.threads * thread_bytes_;
#pragma omp parallel num_threads(plan_.threads)
        {
            Team team{omp_get_thread_num(), omp_get_num_threads(), counters};
            Arena arena(memory + (plan_.by_head ? team.thread * head_bytes_ : 0));
            const BackwardHead<Real> head(arena, call_, plan_);
            Arena own(of_threads + team.thread * thread_bytes_);
            const Memory mine = lay_out(own);
            Arena apart(plan_.by_head || plan_.threads == 1 ? nullptr : of_sums);
            GradientSums<Real> sums(apart, call_, plan_.chunk, plan_.parts > 1);
            mine.outer.start(call_);
            Team alone{0, 1, nullptr};
            if (plan_.by_head) {
                for (std::int64_t at = team.next(); at < heads; at = team.next())
                    if (!call_.skips(at)) differentiate(at / call_.groups, at % call_.groups, head, mine, sums, alone);
            } else {
                for (std::int64_t at = 0; at < heads; ++at)
                    if (!call_.skips(at)) differentiate(at / call_.groups, at % call_.groups, head, mine, sums, team);
            }
        }
    }

private:
    struct Memory {
        OuterMemory<Real> outer;
        RowBlock<Real> rows;
        Real* scratch;
    };

    Memory lay_out(Arena& arena) const {
        OuterMemory<Real> outer(arena, call_);
        RowBlock<Real> block(arena, call_, plan_.tiles * rows);
        return {outer, block, arena.take<Real>(Sizes<Real>::panel * greater(plan_.width, plan_.value_width))};
    }

    // A block of rows of a query head, and the part of it.
    struct Item {
        std::int64_t h, row, part;
    };

    void differentiate(std::int64_t b, std::int64_t g, const BackwardHead<Real>& head, const Memory& mine,
                       GradientSums<Real>& sums, Team& team) const {
        const std::int64_t length = call_.contracted().length, apart = (team.thread - 1) * sums_bytes_;
        const std::int64_t groups = call_.share() / plan_.together * plan_.items * plan_.parts;
        const bool first = team.thread == 0;
        team.meet_again();
        sums.start_head(call_, b, g, first, apart);
        for (std::int64_t start = 0; start < length; start += plan_.chunk) {
            if (start > 0) team.meet();
            sums.start_chunk(call_, plan_.chunk, b, g, start, first, apart);
            pack(b, g, start, head, mine, team);
            team.meet();
            for (std::int64_t turn = 0; turn * team.count < groups; ++turn) {
                // there and back, so that under a mask all threads get rows of every length
                const std::int64_t at = turn * team.count + (turn % 2 ? team.count - 1 - team.thread : team.thread);
                for (std::int64_t i = at * plan_.together; at < groups && i < (at + 1) * plan_.together; ++i)
                    rows_of_item(b, item_of(g, i), start, head, mine, sums);
            }
            team.meet();
            sums.hand_over_chunk(call_, team, sums_bytes_);
        }
        sums.hand_over_head(call_, team, sums_bytes_);
    }

    Item item_of(std::int64_t g, std::int64_t index) const {
        const std::int64_t block = index / call_.share() % plan_.items;
        return {g * call_.share() + index % call_.share(), block * plan_.tiles * rows,
                index / call_.share() / plan_.items};
    }

    void pack(std::int64_t b, std::int64_t g, std::int64_t start, const BackwardHead<Real>& head, const Memory& mine,
              const Team& team) const {
        constexpr std::int64_t panel = Sizes<Real>::panel;
        const Mode& mode = call_.contracted();
        const Rows keys{call_, mode, mode.keys, call_.width, b, g};
        const Rows values{call_, mode, mode.values, call_.value_width, b, g};
        for (std::int64_t p = team.thread * panel; p < plan_.chunk; p += team.count * panel) {
            pack_panel(keys, start + p, mine.scratch, head.key_panels + p * call_.width);
            pack_panel(values, start + p, mine.scratch, head.value_panels + p * call_.value_width);
            pack_columns(keys, start, start + p, start + p + panel, plan_.chunk, mine.scratch, head.key_columns);
            pack_columns(values, start, start + p, start + p + panel, plan_.chunk, mine.scratch, head.value_columns);
        }
    }

    void rows_of_item(std::int64_t b, const Item& item, std::int64_t start, const BackwardHead<Real>& head,
                      const Memory& mine, const GradientSums<Real>& sums) const {
        const RowsAt at{b, item.h, item.row, lesser(plan_.tiles * rows, call_.queries - item.row)};
        if (at.count <= 0) return;
        mine.rows.start(call_, at, mine.scratch);
        Sight<most_rows> sight;
        sight.look(call_, at.row, at.count);
        OuterWalk<Real, most_rows> walk(call_, sight, mine.outer, at);
        const Span outer = part_of(call_.outer() ? call_.modes[0].length : 0, item.part, 1);
        const Span keys = keys_of(item, lesser(plan_.chunk, call_.contracted().length - start));
        for (std::int64_t first = keys.first; first < keys.last; first += plan_.block) {
            const Span block{start + first, start + lesser(keys.last, first + plan_.block)};
            const bool extra = mine.rows.start_block(call_, at, block);
            walk.run(outer, [&] {
                Span spans[most_rows];
                const Span whole = walk.spans(block, spans);
                if (whole.first < whole.last) tuple(walk.tuple, spans, whole, at, block, start, extra, head, mine, sums);
            });
        }
        if (sums.query.to)
            mine.rows.finish(call_, at, sums.query.to + (at.h % call_.share() * call_.queries + at.row) * call_.width);
    }

    // The keys of a chunk that are an item's: all of them, unless order 1 has no outer mode to be parted.
    Span keys_of(const Item& item, std::int64_t count) const {
        return call_.outer() ? Span{0, count} : part_of(count, item.part, Sizes<Real>::panel);
    }

    Span part_of(std::int64_t count, std::int64_t part, std::int64_t unit) const {
        const std::int64_t share = rounded(pieces(count, plan_.parts), unit);
        return Span{part * share, lesser(count, (part + 1) * share)};
    }

    // One outer tuple: a block of rows against a block of contracted keys.
    void tuple(const OuterTuple<Real, most_rows>& outer, const Span* spans, Span whole, const RowsAt& at, Span block,
               std::int64_t start, bool extra, const BackwardHead<Real>& head, const Memory& mine,
               const GradientSums<Real>& sums) const {
        const int level = call_.outer();
        const RowBlock<Real>& block_of_rows = mine.rows;
        const std::int64_t first = block.first - start;
        block_of_rows.fold(call_, at, mine.outer.keys[level], mine.outer.gate[level]);
        const bool to_keys = wants_outer(call_.keys_gradient);
        const GradientTile<Real> step{call_, block_of_rows, plan_.chunk,
                                      head.key_panels + first * call_.width,
                                      head.value_panels + first * call_.value_width,
                                      head.key_columns + first * Sizes<Real>::column,
                                      mine.outer.keys[level]};
        block_of_rows.start_tuple();
        for (std::int64_t row = 0; row < at.count; row += rows) {
            const Span keys = step.weights(row, spans + row, outer.bias[level] + row, extra, whole);
            if (keys.first >= keys.last) continue;
            if (call_.query_gradient || to_keys) step.through_keys(row, keys, to_keys);
        }
        contracted(whole, at, block, start, head.value_columns + first * Sizes<Real>::column, mine, sums);
        for (int t = 0; t < level; ++t) scatter(t, outer.keys[t], at, mine, sums);
    }

    bool wants_outer(void* const* gradients) const {
        for (int t = 0; t < call_.outer(); ++t)
            if (gradients[t]) return true;
        return false;
    }

    // Sums over rows for the contracted mode: D^T Q and P^T G, and of D for its biases. The second, over keys, is the outer
    // values' as well, which saves them a product of their own.
    void contracted(Span whole, const RowsAt& at, Span block, std::int64_t start, const Real* value_columns,
                    const Memory& mine, const GradientSums<Real>& sums) const {
        const int t = call_.outer();
        const RowBlock<Real>& held = mine.rows;
        const std::int64_t count = rounded(at.count, rows), length = block.last - block.first, first = block.first - start;
        if (Real* to = sums.keys[t].to)
            sum_over_rows<Real>({held.gradients, held.query_rows, count, call_.width, held.width, length,
                                 mine.outer.keys[t], to + first * call_.width, nullptr, 0, nullptr},
                                whole);
        Real* to = sums.values[t].to;
        Real* shared = wants_outer(call_.values_gradient) ? held.value_sums : nullptr;
        if (to || shared)
            sum_over_rows<Real>({held.weights, held.gradient_rows, count, call_.value_width, held.value_width, length,
                                 mine.outer.gate[t], to ? to + first * call_.value_width : nullptr, value_columns,
                                 plan_.chunk, shared},
                                whole);
        if (!sums.biases[t].to) return;
        const std::int64_t last = lesser(whole.last, length);
        for (std::int64_t r = 0; r < at.count; ++r) {
            Real* to = sums.bias_row(call_, t, at.h, at.row + r) + block.first;
            for (std::int64_t j = whole.first; j < last; ++j) to[j] += held.gradients[r * Sizes<Real>::pitch + j];
        }
    }

    // What an outer mode gets: the sums of the tuple times the other modes' rows.
    void scatter(int t, std::int64_t j, const RowsAt& at, const Memory& mine, const GradientSums<Real>& sums) const {
        const RowBlock<Real>& held = mine.rows;
        if (Real* to = sums.keys[t].to) add_product(to + j * call_.width, held.key_sums, mine.outer.key, t, call_.width);
        if (Real* to = sums.values[t].to)
            add_product(to + j * call_.value_width, held.value_sums, mine.outer.value, t, call_.value_width);
        if (!sums.biases[t].to) return;
        for (std::int64_t r = 0; r < at.count; ++r) sums.bias_row(call_, t, at.h, at.row + r)[j] += held.row_sums[r];
    }

    void add_product(Real* to, const Real* sums, Real* const* others, int t, std::int64_t width) const {
        for (std::int64_t c = 0; c < width; ++c) {
            Real product = sums[c];
            for (int other = 0; other < call_.outer(); ++other)
                if (other != t) product *= others[other + 1][c];
            to[c] += product;
        }
    }

    const Call call_;
    const BackwardPlan<Real> plan_;
    std::int64_t head_bytes_ = 0, thread_bytes_ = 0, sums_bytes_ = 0;
};

}  // namespace korder::KORDER_ISA
