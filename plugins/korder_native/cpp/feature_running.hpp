// What rows read of sums that grow with them: under a causal mask row i sees the keys up to its own, so that its sums over
// tuples are products of running sums. Features outermost: the running sums of a few of them stay in registers while rows
// go by, and are never stored for a row. Threads share the features, and then the rows that their parts are added up for.
#pragma once

#include "arena.hpp"
#include "centred.hpp"
#include "features.hpp"

namespace korder::KORDER_ISA {

template <class Real>
class FeatureRunning {
    static constexpr int width = Vector<Real>::width;
    static constexpr std::int64_t chunk = 128;  // rows whose own keys are summed in Real before they join the double sums
    static constexpr std::int64_t pitch = chunk + 64 / sizeof(Real);
    static constexpr std::int64_t group = 8, most = 256;  // features made at once, and summed in Real

public:
    explicit FeatureRunning(const RunningCall& call)
        : call_(call), rows_(call.rows), table_(*call.rows.monomials), columns_(pieces(rows_.channels, width)) {}

    std::int64_t bytes() const { return rows_.threads * thread_bytes(); }

    void run(char* memory) const {
#pragma omp parallel num_threads(rows_.threads)
        {
            const int thread = omp_get_thread_num(), count = omp_get_num_threads();
            const Memory m = taken(memory, thread);
            const std::int64_t first = table_.count * thread / count, last = table_.count * (thread + 1) / count;
            clear(m.totals, rows_.tokens * columns_ * width);
            clear(m.last, rows_.tokens * degrees()), clear(m.sizes, rows_.tokens * degrees());
            for (std::int64_t at = 0; at < rows_.tokens && first < last; at += chunk)
                pass(m, first, last, at, lesser(chunk, rows_.tokens - at));
#pragma omp barrier
            finish(memory, count, rows_.tokens * thread / count, rows_.tokens * (thread + 1) / count);
        }
    }

private:
    struct Memory {
        Real *columns[max_order + 1], *products[max_order + 1], *features[max_order + 1];  // the rows' own stand last
        Real *values[max_order], *weights[max_order];  // [channels / width][row][width]; [row]
        Real *ones, *sums, *absolute, *token;          // sums as the values, absolute [row]
        double *totals, *last, *sizes, *shares;        // [row][channel]; [row][degree]; shares [degree][row of a chunk]
    };

    std::int64_t degrees() const { return table_.degree + 1; }

    Memory taken(char* memory, int thread) const {
        Arena arena(memory ? memory + thread * thread_bytes() : nullptr);
        return take(arena);
    }

    Memory take(Arena& arena) const {
        Memory m = {};
        for (int t = 0; t <= call_.order; ++t) {
            m.columns[t] = arena.take<Real>(table_.width * pitch);
            m.products[t] = arena.take<Real>(degrees() * pitch);
            m.features[t] = arena.take<Real>(group * pitch);
        }
        for (int t = 0; t < call_.order; ++t) {
            m.values[t] = arena.take<Real>(columns_ * chunk * width);
            m.weights[t] = arena.take<Real>(chunk);
        }
        m.ones = arena.take<Real>(pitch);
        m.sums = arena.take<Real>(columns_ * chunk * width);
        m.absolute = arena.take<Real>(chunk);
        m.token = arena.take<Real>(greater(table_.width, columns_ * width));
        m.totals = arena.take<double>(rows_.tokens * columns_ * width);
        m.last = arena.take<double>(rows_.tokens * degrees());
        m.sizes = arena.take<double>(rows_.tokens * degrees());
        m.shares = arena.take<double>(chunk * degrees());
        return m;
    }

    std::int64_t thread_bytes() const {
        Arena arena(nullptr);
        take(arena);
        return rounded(arena.used(), 4096);
    }

    // Reads a chunk of rows and the keys that they bring, and adds the features [first, last) of them.
    void pass(const Memory& m, std::int64_t first, std::int64_t last, std::int64_t at, std::int64_t count) const {
        clear(m.ones, pitch, Real(1));
        Ancestors<Real> walks[max_order + 1] = {walk(m, 0), walk(m, 1), walk(m, 2), walk(m, 3), walk(m, 4)};
        for (int t = 0; t < call_.order; ++t) {
            const RunningKeys& mode = call_.modes[t];
            walks[t].read(mode.columns, table_.width, mode.length, mode.first + at, count, m.token);
            pack(m, t, mode.first + at, count);
        }
        walks[call_.order].read(rows_.columns, table_.width, rows_.tokens, at, count, m.token);
        for (std::int64_t j = 0; j < count; ++j)
            centred_shares(*rows_.finish, table_.degree, rows_.finish->centres[at + j], m.shares + j, chunk);
        for (std::int64_t s = 0; s < degrees(); ++s) {
            const std::int64_t low = greater(first - table_.offsets[s], 0);
            const std::int64_t high = lesser(last, table_.offsets[s + 1]) - table_.offsets[s];
            for (std::int64_t from = low; from < high; from += most) {
                clear(m.sums, columns_ * chunk * width), clear(m.absolute, chunk);
                for (std::int64_t leaf = from; leaf < lesser(from + most, high); leaf += group)
                    add_group(m, walks, s, leaf, lesser(leaf + group, lesser(from + most, high)), low, count);
                flush(m, s, at, count);
            }
        }
    }

    Ancestors<Real> walk(const Memory& m, int t) const { return {m.columns[t], m.products[t], m.ones, pitch}; }

    void pack(const Memory& m, int t, std::int64_t first, std::int64_t count) const {
        const RunningKeys& mode = call_.modes[t];
        clear(m.token, columns_ * width);
        for (std::int64_t j = 0; j < count; ++j) {
            if (first + j >= 0 && first + j < mode.length)
                read_values(mode.values, mode.columns.open, rows_.channels, first + j, 1.0, m.token);
            else
                clear(m.token, rows_.channels);
            for (std::int64_t c = 0; c < columns_; ++c)
                store(m.values[t] + (c * chunk + j) * width, load(m.token + c * width));
            m.weights[t][j] = m.token[rows_.channels - 1];
        }
    }

    void add_group(const Memory& m, Ancestors<Real>* walks, std::int64_t s, std::int64_t first, std::int64_t last,
                   std::int64_t start, std::int64_t count) const {
        const std::int64_t length = rounded(count, width);
        for (std::int64_t leaf = first; leaf < last; ++leaf) {
            const std::int64_t from = leaf == start ? 1 : table_.degrees[s].levels[leaf];
            for (int t = 0; t <= call_.order; ++t)
                make(walks[t], s, leaf, from, length, m.features[t] + (leaf - first) * pitch,
                     t == call_.order ? static_cast<const Real*>(call_.weights)[table_.offsets[s] + leaf] : Real(1));
        }
        switch (call_.order) {
            case 1: return add_features<1>(m, table_.offsets[s] + first, last - first, count);
            case 2: return add_features<2>(m, table_.offsets[s] + first, last - first, count);
            case 3: return add_features<3>(m, table_.offsets[s] + first, last - first, count);
            default: return add_features<4>(m, table_.offsets[s] + first, last - first, count);
        }
    }

    KORDER_INLINE void make(Ancestors<Real>& walk, std::int64_t s, std::int64_t leaf, std::int64_t from,
                            std::int64_t length, Real* to, Real factor) const {
        if (s == 0) return clear(to, length, factor);
        const std::int32_t* path = table_.degrees[s].paths + leaf * s;
        walk.walk(path, from, s, length);
        const Real *one = walk.product(s - 1), *other = walk.column(path[s - 1]);
        for (std::int64_t j = 0; j < length; j += width) store(to + j, load(one + j) * load(other + j) * factor);
    }

    // Adds `features` features from row `first` of the table on, two at a time.
    template <int Order>
    void add_features(const Memory& m, std::int64_t first, std::int64_t features, std::int64_t count) const {
        for (std::int64_t i = 0; i < features; ++i) add_sizes<Order>(m, first + i, i, count);
        for (std::int64_t c = 0; c < columns_; ++c) {
            std::int64_t i = 0;
            for (; i + 2 <= features; i += 2) add_column<Order, 2>(m, first + i, i, c, count);
            if (i < features) add_column<Order, 1>(m, first + i, i, c, count);
        }
    }

    // The absolute terms of one feature.
    template <int Order>
    __attribute__((noinline)) void add_sizes(const Memory& m, std::int64_t row, std::int64_t i, std::int64_t count) const {
        Real before[Order], sums[Order] = {};
        for (int t = 0; t < Order; ++t) before[t] = Real(call_.modes[t].absolute[row]);
        for (std::int64_t j = 0; j < count; ++j) {
            Real product = size_of(m.features[Order][i * pitch + j]);
            for (int t = 0; t < Order; ++t) {
                sums[t] += size_of(m.features[t][i * pitch + j]) * m.weights[t][j];
                product *= before[t] + sums[t];
            }
            m.absolute[j] += product;
        }
        for (int t = 0; t < Order; ++t) call_.modes[t].absolute[row] += double(sums[t]);
    }

    static KORDER_INLINE Real size_of(Real x) { return x < Real(0) ? -x : x; }

    // One vector of channels of `Count` features: their running sums, the products of these, and what rows read of them.
    template <int Order, int Count>
    __attribute__((noinline)) void add_column(const Memory& m, std::int64_t row, std::int64_t i, std::int64_t c,
                                              std::int64_t count) const {
        vec<Real> before[Order][Count], sums[Order][Count] = {};  // unrolled everywhere, or they would not be registers
        const std::int64_t lanes = lesser(width, rows_.channels - c * width);
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t)
#pragma GCC unroll 4
            for (int f = 0; f < Count; ++f)
                before[t][f] = narrow(call_.modes[t].sums + (row + f) * rows_.channels + c * width, lanes);
        const Real *features[Order + 1], *values[Order];
#pragma GCC unroll 5
        for (int t = 0; t <= Order; ++t) features[t] = m.features[t] + i * pitch;
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t) values[t] = m.values[t] + c * chunk * width;
        Real* to = m.sums + c * chunk * width;
        for (std::int64_t j = 0; j < count; ++j) {
            vec<Real> product[Count];
#pragma GCC unroll 4
            for (int f = 0; f < Count; ++f) product[f] = spread(features[Order][f * pitch + j]);
#pragma GCC unroll 4
            for (int t = 0; t < Order; ++t) {
                const vec<Real> value = load(values[t] + j * width);
#pragma GCC unroll 4
                for (int f = 0; f < Count; ++f) {
                    sums[t][f] += spread(features[t][f * pitch + j]) * value;
                    product[f] *= before[t][f] + sums[t][f];
                }
            }
            vec<Real> found = load(to + j * width);
#pragma GCC unroll 4
            for (int f = 0; f < Count; ++f) found += product[f];
            store(to + j * width, found);
        }
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t)
#pragma GCC unroll 4
            for (int f = 0; f < Count; ++f)
                widen(call_.modes[t].sums + (row + f) * rows_.channels + c * width, sums[t][f], lanes);
    }

    static KORDER_INLINE vec<Real> narrow(const double* from, std::int64_t lanes) {
        Real found[width] = {};
        if (lanes == width)
            for (int l = 0; l < width; ++l) found[l] = Real(from[l]);
        else
            for (std::int64_t l = 0; l < lanes; ++l) found[l] = Real(from[l]);
        return load(found);
    }

    static KORDER_INLINE void widen(double* to, vec<Real> from, std::int64_t lanes) {
        Real found[width];
        store(found, from);
        if (lanes == width)
            for (int l = 0; l < width; ++l) to[l] += double(found[l]);
        else
            for (std::int64_t l = 0; l < lanes; ++l) to[l] += double(found[l]);
    }

    // Adds what the rows of a chunk read of some features of degree s.
    void flush(const Memory& m, std::int64_t s, std::int64_t at, std::int64_t count) const {
        const std::int64_t last = rows_.channels - 1;
        for (std::int64_t j = 0; j < count; ++j) {
            const double share = m.shares[s * chunk + j];
            for (std::int64_t c = 0; c < columns_; ++c) {
                const Real* from = m.sums + (c * chunk + j) * width;
                double* to = m.totals + ((at + j) * columns_ + c) * width;
                for (int l = 0; l < width; ++l) to[l] += share * double(from[l]);
            }
            m.last[(at + j) * degrees() + s] += double(m.sums[(last / width * chunk + j) * width + last % width]);
            m.sizes[(at + j) * degrees() + s] += double(m.absolute[j]);
        }
    }

    // Adds up the threads' parts of some rows and finishes them.
    void finish(char* memory, int threads, std::int64_t first, std::int64_t last) const {
        const Memory m = taken(memory, 0);
        const Finish& to = *rows_.finish;
        for (std::int64_t i = first; i < last; ++i) {
            double *totals = m.totals + i * columns_ * width, *powers = m.last + i * degrees(),
                   *sizes = m.sizes + i * degrees();
            for (int thread = 1; thread < threads; ++thread) {
                const Memory other = taken(memory, thread);
                add(totals, other.totals + i * columns_ * width, columns_ * width);
                add(powers, other.last + i * degrees(), degrees()), add(sizes, other.sizes + i * degrees(), degrees());
            }
            const double mean = totals[rows_.channels - 1];
            double *sums = rows_.sums + i * rows_.channels, *moments = to.moments + i * degrees();
            if (to.live[i]) {
                for (std::int64_t c = 0; c + 1 < rows_.channels; ++c) sums[c] = totals[c] / mean;
                sums[rows_.channels - 1] = mean;
                to.magnitude[i] =
                    centred_moments(to, table_.degree, to.centres[i], powers, sizes, 1, moments) / mean;
            } else {
                clear(sums, rows_.channels), clear(moments, degrees()), to.magnitude[i] = 0.0;
            }
        }
    }

    static void add(double* to, const double* from, std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
    }

    const RunningCall& call_;
    const FeatureCall& rows_;
    const Monomials& table_;
    std::int64_t columns_;  // vectors of channels
};

}  // namespace korder::KORDER_ISA
