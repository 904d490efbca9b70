// What rows read of sums that grow with them: under a causal mask row i sees the keys up to its own, so that its sums over
// tuples are products of running sums. Features outermost: the running sums of a few of them stay in registers while rows
// go by, and are never stored for a row. Threads share the features, and then the rows that their parts are added up for.
#pragma once

#include "centred.hpp"
#include "running_features.hpp"

namespace korder::KORDER_ISA {

template <class Real>
class FeatureRunning {
    static constexpr int width = Vector<Real>::width;
    static constexpr std::int64_t chunk = 64;  // rows whose own keys are summed in Real before they join the double sums
    static constexpr std::int64_t sets = 2, group = sets * width, most = 256;  // features together, and summed in Real
    static_assert(chunk % width == 0 && most % group == 0);
    using Features = RunningFeatures<Real, chunk>;

public:
    explicit FeatureRunning(const RunningCall& call) : call_(call), rows_(call.rows), table_(*call.rows.monomials) {}

    std::int64_t bytes() const { return rows_.threads * thread_bytes(); }

    void run(char* memory) const {
#pragma omp parallel num_threads(rows_.threads)
        {
            const int thread = omp_get_thread_num(), count = omp_get_num_threads();
            Arena arena(memory + thread * thread_bytes());
            Memory m = take(arena);
            const std::int64_t first = table_.count * thread / count, last = table_.count * (thread + 1) / count;
            clear(m.part.totals, rows_.channels * padded());
            clear(m.part.last, degrees() * padded()), clear(m.part.sizes, degrees() * padded());
            for (std::int64_t at = 0; at < rows_.tokens && first < last; at += chunk)
                pass(m, first, last, at, lesser(chunk, rows_.tokens - at));
#pragma omp barrier
            finish(memory, count, rows_.tokens * thread / count, rows_.tokens * (thread + 1) / count);
        }
    }

private:
    struct Parts {
        double *totals, *last, *sizes;  // [channel or degree][row]
    };

    struct Memory {
        Parts part;
        double* shares;                 // [degree][row of a chunk]
        Real* values[max_order];        // [channel][row]
        Real *sums, *absolute, *token;  // [channel][row][feature], [row][feature]
        Features features[max_order + 1];  // those of the rows stand behind those of the modes
    };

    std::int64_t degrees() const { return table_.degree + 1; }
    std::int64_t padded() const { return rounded(rows_.tokens, chunk); }

    Parts take_parts(Arena& arena) const {
        return {arena.take<double>(rows_.channels * padded()), arena.take<double>(degrees() * padded()),
                arena.take<double>(degrees() * padded())};
    }

    Memory take(Arena& arena) const {
        const Parts part = take_parts(arena);
        double* shares = arena.take<double>(degrees() * chunk);
        Real* values[max_order] = {};
        for (int t = 0; t < call_.order; ++t) values[t] = arena.take<Real>(rows_.channels * chunk);
        Real* sums = arena.take<Real>(rows_.channels * chunk * width);
        Real* absolute = arena.take<Real>(chunk * width);
        Real* token = arena.take<Real>(rows_.channels);
        const auto features = [&] { return Features(arena, table_, rows_.channels, sets); };
        return {part, shares, {values[0], values[1], values[2], values[3]}, sums, absolute, token,
                {features(), features(), features(), features(), features()}};
    }

    std::int64_t thread_bytes() const {
        Arena arena(nullptr);
        take(arena);
        return rounded(arena.used(), 4096);
    }

    // Reads a chunk of rows and the keys that they bring, and adds the features [first, last) of them.
    void pass(Memory& m, std::int64_t first, std::int64_t last, std::int64_t at, std::int64_t count) const {
        for (int t = 0; t < call_.order; ++t) {
            const RunningKeys& mode = call_.modes[t];
            m.features[t].read(mode.columns, mode.length, mode.first + at, count);
            read_running_values(mode, rows_.channels, mode.first + at, count, chunk, m.token, m.values[t]);
        }
        m.features[call_.order].read(rows_.columns, rows_.tokens, at, count);
        clear(m.shares, degrees() * chunk);
        for (std::int64_t j = 0; j < count; ++j)
            centred_shares(*rows_.finish, table_.degree, rows_.finish->centres[at + j], m.shares + j, chunk);
        for (std::int64_t s = 0; s < degrees(); ++s) {
            const std::int64_t low = greater(first - table_.offsets[s], 0);
            const std::int64_t high = lesser(last, table_.offsets[s + 1]) - table_.offsets[s];
            for (std::int64_t from = low; from < high; from += most) {
                clear(m.sums, rows_.channels * chunk * width), clear(m.absolute, chunk * width);
                for (std::int64_t leaf = from; leaf < lesser(from + most, high); leaf += group)
                    add_group(m, s, leaf, lesser(leaf + group, lesser(from + most, high)), leaf == low, count);
                flush(m, s, at);
            }
        }
    }

    void add_group(Memory& m, std::int64_t s, std::int64_t first, std::int64_t last, bool starts, std::int64_t count) const {
        const bool two = last - first > width;
        for (int t = 0; t <= call_.order; ++t)
            for (int set = 0; set <= int(two); ++set)
                m.features[t].make(s, first + set * width, last, starts && set == 0,
                                   t == call_.order ? static_cast<const Real*>(call_.weights) : nullptr, set);
        const std::int64_t row = table_.offsets[s] + first;
        switch (call_.order) {
            case 1: return add_features<1>(m, row, last - first, count);
            case 2: return add_features<2>(m, row, last - first, count);
            case 3: return add_features<3>(m, row, last - first, count);
            default: return add_features<4>(m, row, last - first, count);
        }
    }

    template <int Order>
    void add_features(const Memory& m, std::int64_t row, std::int64_t features, std::int64_t count) const {
        for (std::int64_t set = 0; set * width < features; ++set)
            add_sizes<Order>(m, row + set * width, features - set * width, set, count);
        // of high orders the sums of two vectors of features would not fit the registers
        const bool together = Order < 3 && features > width;
        for (std::int64_t c = 0; c < rows_.channels; ++c) {
            if (together) {
                add_channel<Order, 2>(m, row, features, 0, c, count);
                continue;
            }
            for (std::int64_t set = 0; set * width < features; ++set)
                add_channel<Order, 1>(m, row + set * width, features - set * width, set, c, count);
        }
    }

    // The absolute terms of a vector of features.
    template <int Order>
    __attribute__((noinline)) void add_sizes(const Memory& m, std::int64_t row, std::int64_t features, std::int64_t set,
                                             std::int64_t count) const {
        vec<Real> before[Order], sums[Order] = {};
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t) before[t] = gathered<Real>(call_.modes[t].absolute + row, 1, features);
        const Real* own = m.features[Order].lanes(set);
        for (std::int64_t j = 0; j < count; ++j) {
            vec<Real> product = absolute<Real>(load(own + j * width));
#pragma GCC unroll 4
            for (int t = 0; t < Order; ++t) {
                sums[t] += absolute<Real>(load(m.features[t].lanes(set) + j * width)) *
                           m.values[t][(rows_.channels - 1) * chunk + j];
                product *= before[t] + sums[t];
            }
            store(m.absolute + j * width, load(m.absolute + j * width) + product);
        }
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t) scatter_added<Real>(call_.modes[t].absolute + row, 1, features, sums[t]);
    }

    // One channel of `Sets` vectors of features: their running sums, the products of these, and what rows read of them.
    // Everything is unrolled, or sums would not be registers.
    template <int Order, int Sets>
    __attribute__((noinline)) void add_channel(const Memory& m, std::int64_t row, std::int64_t features, std::int64_t set,
                                               std::int64_t c, std::int64_t count) const {
        vec<Real> before[Order][Sets], sums[Order][Sets] = {};
        const Real *lanes[Order + 1], *values[Order];
#pragma GCC unroll 5
        for (int t = 0; t <= Order; ++t) lanes[t] = m.features[t].lanes(set);
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t) {
            values[t] = m.values[t] + c * chunk;
#pragma GCC unroll 2
            for (int f = 0; f < Sets; ++f)
                before[t][f] = gathered<Real>(call_.modes[t].sums + (row + f * width) * rows_.channels + c, rows_.channels,
                                              features - f * width);
        }
        Real* to = m.sums + c * chunk * width;
        for (std::int64_t j = 0; j < count; ++j) {
            vec<Real> product[Sets];
#pragma GCC unroll 2
            for (int f = 0; f < Sets; ++f) product[f] = load(lanes[Order] + f * chunk * width + j * width);
#pragma GCC unroll 4
            for (int t = 0; t < Order; ++t) {
                const vec<Real> value = spread(values[t][j]);
#pragma GCC unroll 2
                for (int f = 0; f < Sets; ++f) {
                    sums[t][f] += load(lanes[t] + f * chunk * width + j * width) * value;
                    product[f] *= before[t][f] + sums[t][f];
                }
            }
            vec<Real> found = load(to + j * width);
#pragma GCC unroll 2
            for (int f = 0; f < Sets; ++f) found += product[f];
            store(to + j * width, found);
        }
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t)
#pragma GCC unroll 2
            for (int f = 0; f < Sets; ++f)
                scatter_added<Real>(call_.modes[t].sums + (row + f * width) * rows_.channels + c, rows_.channels,
                                    features - f * width, sums[t][f]);
    }

    // Adds what the rows of a chunk read of some features of degree s.
    void flush(const Memory& m, std::int64_t s, std::int64_t at) const {
        for (std::int64_t j = 0; j < chunk; j += width) {
            for (std::int64_t c = 0; c < rows_.channels; ++c) {
                const vec<Real> sum = sums_over_lanes(m.sums + (c * chunk + j) * width);
                add_wide<Real>(m.part.totals + c * padded() + at + j, m.shares + s * chunk + j, sum);
                if (c + 1 == rows_.channels) add_wide<Real>(m.part.last + s * padded() + at + j, nullptr, sum);
            }
            add_wide<Real>(m.part.sizes + s * padded() + at + j, nullptr, sums_over_lanes(m.absolute + j * width));
        }
    }

    // Adds up the threads' parts of some rows and finishes them.
    void finish(char* memory, int threads, std::int64_t first, std::int64_t last) const {
        const Finish& to = *rows_.finish;
        const auto parts = [&](int thread) {
            Arena arena(memory + thread * thread_bytes());
            return take_parts(arena);
        };
        const Parts m = parts(0);
        for (int thread = 1; thread < threads; ++thread) {
            const Parts other = parts(thread);
            for (std::int64_t c = 0; c < rows_.channels; ++c)
                add(m.totals + c * padded(), other.totals + c * padded(), first, last);
            for (std::int64_t s = 0; s < degrees(); ++s) {
                add(m.last + s * padded(), other.last + s * padded(), first, last);
                add(m.sizes + s * padded(), other.sizes + s * padded(), first, last);
            }
        }
        for (std::int64_t i = first; i < last; ++i)
            finish_row(to, table_.degree, rows_.channels, i, m.totals + i, m.last + i, m.sizes + i, padded(), rows_.sums);
    }

    static void add(double* to, const double* from, std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) to[i] += from[i];
    }

    const RunningCall& call_;
    const FeatureCall& rows_;
    const Monomials& table_;
};

}  // namespace korder::KORDER_ISA
