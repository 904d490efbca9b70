// Threads that work on a head together, and how many of them a call is worth.
#pragma once

#include <omp.h>

#include "reading.hpp"

namespace korder::KORDER_ISA {

constexpr std::int64_t chunk_bytes = 4 << 20;  // of packed keys and values, at most
constexpr std::int64_t least_chunk = 64 << 10;  // the same where memory is short

// Threads meet seldom: on a busy machine each meeting may wait for a thread that the system has put aside.
struct Team {
    int thread, count;
    std::int64_t* counters;  // two, for this phase and the next one
    int phase = 0;

    std::int64_t next() { return __atomic_fetch_add(counters + phase % 2, 1, __ATOMIC_RELAXED); }

    // After it everybody sees what everybody wrote, and counting starts again.
    void meet() {
        if (count == 1) return;
        ++phase;
#pragma omp barrier
        // nobody counts with the other one any more, and nobody does yet: that takes another meeting
        if (thread == 0) __atomic_store_n(counters + (phase + 1) % 2, 0, __ATOMIC_RELAXED);
    }

    // As `meet`, but not before the first work of all.
    void meet_again() {
        if (phase > 0) meet();
    }
};

KORDER_INLINE double outer_tuples(const Call& call) {
    double tuples = 1;
    for (int t = 0; t < call.outer(); ++t) tuples *= double(call.modes[t].length);
    return tuples;
}

KORDER_INLINE int threads_for(const Call& call, double passes) {
    const double work = passes * double(call.batch * call.heads) * double(call.queries) * outer_tuples(call) *
                        double(call.contracted().length) * double(call.width + call.value_width);
    if (work >= work_of_a_thread * call.threads) return call.threads;
    return int(greater(1, std::int64_t(work / work_of_a_thread)));
}

// How a call is shared out: among how many threads, whether each has heads of its own, and how much is packed at a time.
struct Shares {
    int threads;
    bool by_head;
    std::int64_t chunk;  // bytes
};

// The first way that fits the memory of a call, many threads before few and large chunks before small; the smallest of
// all if none does.
template <class Bytes>
Shares shares_that_fit(const Call& call, double passes, Bytes&& bytes) {
    const std::int64_t heads = call.batch * call.groups;
    Shares shares{};
    for (int threads = threads_for(call, passes); threads > 0; --threads) {
        const bool best = threads == 1 || heads >= 4 * threads;
        for (int turn = 0; turn < 2; ++turn) {
            const bool by_head = turn ? !best : best;
            if (threads > 1 && by_head && heads < threads) continue;
            for (std::int64_t chunk = chunk_bytes; chunk >= least_chunk; chunk /= 4) {
                shares = Shares{threads, by_head, chunk};
                if (bytes(shares) <= call.memory) return shares;
            }
        }
    }
    return shares;
}

}  // namespace korder::KORDER_ISA
