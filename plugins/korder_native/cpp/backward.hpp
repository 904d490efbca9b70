// The exact backward: scores again from lse, six products, nothing of the size of the scores kept.
//
// A block of rows meets a block of contracted keys under every outer tuple while both stay near the core. Weights P and
// score gradients D of the block are held; from them come, per tile of rows, D K and P V, whose rows scatter into the
// gradients of queries, outer keys and outer values, and, per block, the sums over rows D^T Q and P^T G for the
// contracted mode. Each thread sums what several rows share in memory of its own, rows go to threads by a fixed rule,
// and the sums are added in the order of threads: the same threads give the same bits.
#pragma once

#include "gradient_tile.hpp"
#include "team.hpp"

namespace korder::KORDER_ISA {

constexpr std::int64_t backward_block_bytes = 256 << 10;  // packed keys and values and their gradients, near a core

template <class Real>
struct BackwardPlan {
    static constexpr int rows = Shape::rows, most_tiles = 8, most_rows = rows * most_tiles;
    std::int64_t width, value_width;  // in whole vectors
    std::int64_t chunk, block;        // contracted keys
    std::int64_t tiles, items;
    int threads;
    bool by_head;

    explicit BackwardPlan(const Call& call) {
        constexpr std::int64_t panel = Sizes<Real>::panel;
        width = rounded(call.width, Sizes<Real>::column), value_width = rounded(call.value_width, Sizes<Real>::column);
        const std::int64_t length = greater(call.contracted().length, 1);
        const std::int64_t row = (call.width + call.value_width + width + value_width) * sizeof(Real);
        chunk = rounded(pieces(length, pieces(length, greater(chunk_bytes / row / panel, 1) * panel)), panel);
        const std::int64_t most = greater(backward_block_bytes / (2 * row) / panel, 1) * panel;
        block = rounded(pieces(chunk, pieces(chunk, lesser(most, Sizes<Real>::keys))), panel);
        threads = threads_for(call, 3.0);
        by_head = threads == 1 || call.batch * call.groups >= 4 * threads;
        tiles = even_tiles(call);
        items = pieces(call.queries, tiles * rows);
    }

    // Rows a block: many, for the sums over rows, but such that all threads get the same.
    std::int64_t even_tiles(const Call& call) const {
        const std::int64_t share = call.share(), all = greater(1, pieces(call.queries, rows)), most = lesser(most_tiles, all);
        if (by_head) return pieces(all, pieces(all, most));
        std::int64_t best = most, least = INT64_MAX;
        for (std::int64_t size = most; size >= pieces(most, 2); --size) {
            const std::int64_t longest = pieces(share * pieces(all, size), threads) * size;
            if (longest < least) best = size, least = longest;
        }
        return best;
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

// What one thread sums for one key head: gradients of every mode's keys and values, and of biases of keys alone.
template <class Real>
struct GradientSums {
    Real *keys[max_order], *values[max_order], *biases[max_order];

    GradientSums(Arena& arena, const Call& call, const BackwardPlan<Real>& plan) {
        for (int t = 0; t < call.order; ++t) {
            const std::int64_t length = call.modes[t].length + Shape::rows + Sizes<Real>::panel;
            keys[t] = call.keys_gradient[t] ? arena.take<Real>(length * plan.width) : nullptr;
            values[t] = call.values_gradient[t] ? arena.take<Real>(length * plan.value_width) : nullptr;
            const bool shared = call.bias_gradient[t] && !call.modes[t].by_row;
            biases[t] = shared ? arena.take<Real>(call.share() * call.modes[t].length) : nullptr;
        }
    }

    void start(const Call& call, const BackwardPlan<Real>& plan) const {
        for (int t = 0; t < call.order; ++t) {
            const std::int64_t length = call.modes[t].length + Shape::rows + Sizes<Real>::panel;
            if (keys[t]) clear(keys[t], length * plan.width);
            if (values[t]) clear(values[t], length * plan.value_width);
            if (biases[t]) clear(biases[t], call.share() * call.modes[t].length);
        }
    }
};

template <class Real>
class Backward {
public:
    static constexpr int rows = Shape::rows, most_rows = BackwardPlan<Real>::most_rows;

    explicit Backward(const Call& call) : call_(call), plan_(call) {
        Arena head(nullptr), thread(nullptr);
        BackwardHead<Real>(head, call_, plan_);
        lay_out(thread);
        head_bytes_ = head.used(), thread_bytes_ = thread.used();
    }

    std::int64_t bytes() const {
        return (plan_.by_head ? plan_.threads : 1) * head_bytes_ + plan_.threads * thread_bytes_;
    }

    void run(char* memory) const {
        std::int64_t counters[2] = {0, 0};
        const std::int64_t heads = call_.batch * call_.groups;
        char* of_threads = memory + (plan_.by_head ? plan_.threads : 1) * head_bytes_;
#pragma omp parallel num_threads(plan_.threads)
        {
            Team team{omp_get_thread_num(), omp_get_num_threads(), counters};
            Arena arena(memory + (plan_.by_head ? team.thread * head_bytes_ : 0));
            const BackwardHead<Real> head(arena, call_, plan_);
            Arena own(of_threads + team.thread * thread_bytes_);
            const Memory mine = lay_out(own);
            mine.outer.start(call_);
            if (plan_.by_head)
                for (std::int64_t at = team.next(); at < heads; at = team.next())
                    {
                    Team alone{0, 1, nullptr};
                    differentiate(at / call_.groups, at % call_.groups, head, mine, alone);
                }
            else
                for (std::int64_t at = 0; at < heads; ++at)
                    differentiate(at / call_.groups, at % call_.groups, head, mine, team);
        }
    }

private:
    struct Memory {
        GradientSums<Real> sums;
        OuterMemory<Real> outer;
        RowBlock<Real> rows;
        Real* scratch;
    };

    Memory lay_out(Arena& arena) const {
        GradientSums<Real> sums(arena, call_, plan_);
        OuterMemory<Real> outer(arena, call_);
        RowBlock<Real> block(arena, call_, plan_.tiles * rows);
        return {sums, outer, block,
                arena.take<Real>(Sizes<Real>::panel * greater(plan_.width, plan_.value_width))};
    }

    void differentiate(std::int64_t b, std::int64_t g, const BackwardHead<Real>& head, const Memory& mine,
                       Team& team) const {
        const std::int64_t length = call_.contracted().length, items = call_.share() * plan_.items;
        team.meet_again();
        mine.sums.start(call_, plan_);
        for (std::int64_t start = 0; start < length; start += plan_.chunk) {
            if (start > 0) team.meet();
            pack(b, g, start, head, mine, team);
            team.meet();
            for (std::int64_t turn = 0; turn * team.count < items; ++turn) {
                // there and back, so that under a mask all threads get rows of every length
                const std::int64_t at = turn * team.count + (turn % 2 ? team.count - 1 - team.thread : team.thread);
                if (at < items)
                    rows_of_item(b, g * call_.share() + at % call_.share(), at / call_.share() * plan_.tiles * rows, start,
                                 head, mine);
            }
        }
        team.meet();
        hand_over(b, g, mine, team);
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

    void rows_of_item(std::int64_t b, std::int64_t h, std::int64_t row, std::int64_t start, const BackwardHead<Real>& head,
                      const Memory& mine) const {
        const RowsAt at{b, h, row, lesser(plan_.tiles * rows, call_.queries - row)};
        mine.rows.start(call_, at, mine.scratch);
        Sight<most_rows> sight;
        sight.look(call_, row, at.count);
        OuterWalk<Real, most_rows> walk(call_, sight, mine.outer, at);
        const std::int64_t last = lesser(start + plan_.chunk, call_.contracted().length);
        for (std::int64_t first = start; first < last; first += plan_.block) {
            const Span block{first, lesser(last, first + plan_.block)};
            const bool extra = mine.rows.start_block(call_, at, block);
            walk.run(Span{0, INT64_MAX}, [&] {
                Span spans[most_rows];
                const Span whole = walk.spans(block, spans);
                if (whole.first < whole.last) tuple(walk.tuple, spans, whole, at, block, start, extra, head, mine);
            });
            mine.rows.finish_block(call_, at, block);
        }
        mine.rows.finish(call_, at, start == 0);
    }

    // One outer tuple: a block of rows against a block of contracted keys.
    void tuple(const OuterTuple<Real, most_rows>& outer, const Span* spans, Span whole, const RowsAt& at, Span block,
               std::int64_t start, bool extra, const BackwardHead<Real>& head, const Memory& mine) const {
        const int level = call_.outer();
        const RowBlock<Real>& block_of_rows = mine.rows;
        const std::int64_t first = block.first - start;
        block_of_rows.fold(call_, at, mine.outer.keys[level], mine.outer.gate[level]);
        const bool to_keys = wants_outer(call_.keys_gradient), to_values = wants_outer(call_.values_gradient);
        const GradientTile<Real> step{call_, block_of_rows, plan_.chunk,
                                      head.key_panels + first * call_.width,
                                      head.value_panels + first * call_.value_width,
                                      head.key_columns + first * Sizes<Real>::column,
                                      head.value_columns + first * Sizes<Real>::column,
                                      mine.outer.keys[level]};
        block_of_rows.start_tuple();
        for (std::int64_t row = 0; row < at.count; row += rows) {
            const Span keys = step.weights(row, spans + row, outer.bias[level] + row, extra, whole);
            if (keys.first >= keys.last) continue;
            if (call_.query_gradient || to_keys) step.through_keys(row, keys, to_keys);
            if (to_values) step.through_values(row, keys);
        }
        contracted(whole, at, block, mine);
        for (int t = 0; t < level; ++t) scatter(t, outer.keys[t], at, mine);
    }

    bool wants_outer(void* const* gradients) const {
        for (int t = 0; t < call_.outer(); ++t)
            if (gradients[t]) return true;
        return false;
    }

    // Sums over rows for the contracted mode: D^T Q and P^T G, and of D for its biases.
    void contracted(Span whole, const RowsAt& at, Span block, const Memory& mine) const {
        const int t = call_.outer();
        const RowBlock<Real>& held = mine.rows;
        const std::int64_t count = rounded(at.count, rows);
        if (Real* sums = mine.sums.keys[t])
            sum_over_rows(held.gradients, held.folded_rows, count, whole, held.width, sums + block.first * held.width);
        if (Real* sums = mine.sums.values[t])
            sum_over_rows(held.weights, held.gated_rows, count, whole, held.value_width,
                          sums + block.first * held.value_width);
        if (call_.bias_gradient[t]) held.add_extra(whole);
        if (Real* sums = mine.sums.biases[t]) {
            Real* to = sums + at.h % call_.share() * call_.contracted().length + block.first;
            const std::int64_t last = lesser(whole.last, block.last - block.first);
            for (std::int64_t r = 0; r < at.count; ++r)
                for (std::int64_t j = whole.first; j < last; ++j) to[j] += held.gradients[r * Sizes<Real>::pitch + j];
        }
    }

    // What an outer mode gets: the sums of the tuple times the other modes' rows.
    void scatter(int t, std::int64_t j, const RowsAt& at, const Memory& mine) const {
        const RowBlock<Real>& held = mine.rows;
        if (Real* sums = mine.sums.keys[t]) add_product(sums + j * held.width, held.key_sums, mine.outer.key, t, held.width);
        if (Real* sums = mine.sums.values[t])
            add_product(sums + j * held.value_width, held.value_sums, mine.outer.value, t, held.value_width);
        if (!call_.bias_gradient[t]) return;
        const std::int64_t h = at.h % call_.share();
        for (std::int64_t r = 0; r < at.count; ++r) {
            if (mine.sums.biases[t])
                mine.sums.biases[t][h * call_.modes[t].length + j] += held.row_sums[r];
            else
                bias_row(t, at, r)[j] += held.row_sums[r];
        }
    }

    Real* bias_row(int t, const RowsAt& at, std::int64_t r) const {
        return static_cast<Real*>(call_.bias_gradient[t]) +
               ((at.b * call_.heads + at.h) * call_.queries + at.row + r) * call_.modes[t].length;
    }

    void add_product(Real* to, const Real* sums, Real* const* others, int t, std::int64_t width) const {
        for (std::int64_t c = 0; c < width; ++c) {
            Real product = sums[c];
            for (int other = 0; other < call_.outer(); ++other)
                if (other != t) product *= others[other + 1][c];
            to[c] += product;
        }
    }

    // Adds the threads' sums in their order, and writes the gradients of a key head.
    void hand_over(std::int64_t b, std::int64_t g, const Memory& mine, const Team& team) const {
        for (int t = 0; t < call_.order; ++t) {
            const std::int64_t length = call_.modes[t].length, first = (b * call_.groups + g) * length;
            for (std::int64_t j = team.thread; j < length; j += team.count) {
                total(mine.sums.keys[t], j * plan_.width, call_.width, team, call_.keys_gradient[t], first + j);
                total(mine.sums.values[t], j * plan_.value_width, call_.value_width, team, call_.values_gradient[t],
                      first + j);
            }
            for (std::int64_t c = team.thread; c < call_.share(); c += team.count)
                total(mine.sums.biases[t], c * length, length, team, call_.bias_gradient[t],
                      b * call_.heads + g * call_.share() + c);
        }
    }

    // The memory of all threads is laid out alike, so the sums of another one lie as far away as its memory does.
    void total(const Real* sums, std::int64_t from, std::int64_t width, const Team& team, void* gradient,
               std::int64_t row) const {
        if (!sums || !width) return;
        Real* to = static_cast<Real*>(gradient) + row * width;
        clear(to, width);
        for (int thread = 0; thread < team.count; ++thread) {
            const char* its = reinterpret_cast<const char*>(sums + from) + (thread - team.thread) * thread_bytes_;
            for (std::int64_t c = 0; c < width; ++c) to[c] += reinterpret_cast<const Real*>(its)[c];
        }
    }

    const Call call_;
    const BackwardPlan<Real> plan_;
    std::int64_t head_bytes_ = 0, thread_bytes_ = 0;
};

}  // namespace korder::KORDER_ISA
