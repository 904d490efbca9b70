// Where gradients are summed. The first thread of a team, and every thread that has heads of its own, adds to the results
// themselves. The others hold what several threads add to in memory of their own, and it is added to the results in the
// order of threads: the same threads give the same bits, and one thread needs no memory for sums at all.
#pragma once

#include "arena.hpp"
#include "team.hpp"

namespace korder::KORDER_ISA {

// A run of numbers that threads add to.
template <class Real>
struct Sum {
    Real* own = nullptr;     // of the second thread, the others' lie as far apart as their memory; null if none is needed
    Real* result = nullptr;  // null if nobody wants it
    Real* to = nullptr;      // where this thread adds
    std::int64_t count = 0;

    void lay_out(Arena& arena, const void* wanted, std::int64_t numbers, bool apart) {
        if (!wanted) return;
        count = numbers;
        if (apart) own = arena.take<Real>(numbers);
    }

    // The result for now, and this thread's place for it; `apart` is how far from the second thread's memory its own is.
    void aim(void* gradient, std::int64_t at, bool alone, std::int64_t apart) {
        if (!gradient) return;
        result = static_cast<Real*>(gradient) + at;
        to = own && !alone ? reinterpret_cast<Real*>(reinterpret_cast<char*>(own) + apart) : result;
    }

    void start() const {
        if (to != result) clear(to, count);
    }

    // Adds the other threads' numbers to this thread's part of the result.
    void hand_over(const Team& team, std::int64_t apart) const {
        if (!own || !result || team.count == 1) return;
        const std::int64_t last = count * (team.thread + 1) / team.count;
        for (int thread = 1; thread < team.count; ++thread) {
            const Real* its = reinterpret_cast<const Real*>(reinterpret_cast<const char*>(own) + (thread - 1) * apart);
            for (std::int64_t c = count * team.thread / team.count; c < last; ++c) result[c] += its[c];
        }
    }
};

// The gradients of one key head, of the contracted mode those of one chunk.
template <class Real>
struct GradientSums {
    Sum<Real> query, keys[max_order], values[max_order], biases[max_order];

    // `parted`: whether several threads work on the same rows.
    GradientSums(Arena& arena, const Call& call, std::int64_t chunk, bool parted) {
        query.lay_out(arena, call.query_gradient, call.share() * call.queries * call.width, parted);
        for (int t = 0; t < call.order; ++t) {
            const std::int64_t length = t == call.outer() ? chunk : call.modes[t].length;
            keys[t].lay_out(arena, call.keys_gradient[t], length * call.width, true);
            values[t].lay_out(arena, call.values_gradient[t], length * call.value_width, true);
            const std::int64_t heads = call.bias_head[t] ? call.share() : 1;
            biases[t].lay_out(arena, call.bias_gradient[t], heads * bias_rows(call, t) * call.modes[t].length,
                              parted || !call.modes[t].by_row);
        }
    }

    void start_head(const Call& call, std::int64_t b, std::int64_t g, bool alone, std::int64_t apart) {
        query.aim(call.query_gradient, (b * call.heads + g * call.share()) * call.queries * call.width, alone, apart);
        query.start();
        for (int t = 0; t < call.order; ++t) {
            biases[t].aim(call.bias_gradient[t], b * call.bias_batch[t] + g * call.share() * call.bias_head[t], alone, apart);
            biases[t].start();
            if (t < call.outer()) start_mode(call, t, b, g, 0, alone, apart);
        }
    }

    void start_chunk(const Call& call, std::int64_t chunk, std::int64_t b, std::int64_t g, std::int64_t start, bool alone,
                     std::int64_t apart) {
        const int t = call.outer();
        const std::int64_t count = lesser(chunk, call.contracted().length - start);
        keys[t].count = count * call.width, values[t].count = count * call.value_width;
        start_mode(call, t, b, g, start, alone, apart);
    }

    void hand_over_chunk(const Call& call, const Team& team, std::int64_t apart) const {
        keys[call.outer()].hand_over(team, apart), values[call.outer()].hand_over(team, apart);
    }

    void hand_over_head(const Call& call, const Team& team, std::int64_t apart) const {
        query.hand_over(team, apart);
        for (int t = 0; t < call.order; ++t) {
            biases[t].hand_over(team, apart);
            if (t < call.outer()) keys[t].hand_over(team, apart), values[t].hand_over(team, apart);
        }
    }

    // Where the gradients of a row's biases are, those of all rows if they share them.
    Real* bias_row(const Call& call, int t, std::int64_t h, std::int64_t i) const {
        if (!biases[t].to) return nullptr;
        const std::int64_t row = call.modes[t].by_row ? i * call.modes[t].length : 0;
        return biases[t].to + h % call.share() * call.bias_head[t] + row;
    }

private:
    static std::int64_t bias_rows(const Call& call, int t) { return call.modes[t].by_row ? call.queries : 1; }

    void start_mode(const Call& call, int t, std::int64_t b, std::int64_t g, std::int64_t start, bool alone,
                    std::int64_t apart) {
        const std::int64_t row = (b * call.groups + g) * call.modes[t].length + start;
        keys[t].aim(call.keys_gradient[t], row * call.width, alone, apart);
        values[t].aim(call.values_gradient[t], row * call.value_width, alone, apart);
        keys[t].start(), values[t].start();
    }
};

}  // namespace korder::KORDER_ISA
