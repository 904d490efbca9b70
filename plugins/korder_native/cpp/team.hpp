// Threads that work on a head together, and how many of them a call is worth.
#pragma once

#include <omp.h>

#include "reading.hpp"

namespace korder::KORDER_ISA {

constexpr std::int64_t chunk_bytes = 4 << 20;  // of packed keys and values
constexpr double work_of_a_thread = 1 << 20;   // multiplications below which another thread does not pay

struct Team {
    int thread, count;
    std::int64_t* counter;

    std::int64_t next() const { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

    // After it everybody sees what everybody wrote, and the counter starts again.
    void meet() const {
        if (count == 1) return;
#pragma omp barrier
        if (thread == 0) __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
#pragma omp barrier
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

}  // namespace korder::KORDER_ISA
