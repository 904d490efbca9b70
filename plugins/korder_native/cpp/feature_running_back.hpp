// The way back through running sums: rows last first, sums shrink by what each chunk added, gradients of sums grow.
//
// For one channel of a vector of features a chunk of rows is walked twice: forwards for the sums, which are kept for the
// chunk, and backwards for everything else. Threads share the features, and then the rows that their parts go to.
#pragma once

#include "path_gradients.hpp"
#include "running_features.hpp"

namespace korder::KORDER_ISA {

template <class Real>
class FeatureRunningBack {
    static constexpr int width = Vector<Real>::width;
    static constexpr std::int64_t chunk = 64, most = 256;  // as in `FeatureRunning`, whose chunks these must be
    using Features = RunningFeatures<Real, chunk>;

public:
    explicit FeatureRunningBack(const RunningBack& back)
        : back_(back), call_(back.call), rows_(back.call.rows), table_(*back.call.rows.monomials) {}

    std::int64_t bytes() const { return rows_.threads * thread_bytes(); }

    void run(char* memory) const {
#pragma omp parallel num_threads(rows_.threads)
        {
            const int thread = omp_get_thread_num(), count = omp_get_num_threads();
            Arena arena(memory + thread * thread_bytes());
            Memory m = take(arena);
            const std::int64_t first = table_.count * thread / count, last = table_.count * (thread + 1) / count;
            clear(m.part.columns, (call_.order + 1) * table_.width * padded());
            clear(m.part.values, call_.order * rows_.channels * padded());
            for (std::int64_t at = padded() - chunk; at >= 0 && first < last; at -= chunk)
                pass(m, first, last, at, lesser(chunk, rows_.tokens - at));
#pragma omp barrier
            finish(memory, count, rows_.tokens * thread / count, rows_.tokens * (thread + 1) / count);
        }
    }

private:
    struct Parts {
        double *columns, *values;  // [factor][column][row], [mode][channel][row]
    };

    // Factors are the modes' keys, and behind them the rows.
    struct Memory {
        Parts part;
        Real *values, *gradient;                // [mode][channel][row]; [channel][row], of a degree
        Real *of_values, *of_features;          // [mode][channel][row][feature]; [factor][row][feature]
        Real *of_columns, *of_products, *rows;  // [factor][column][row]; [step][row]; [feature][row]
        Real *running, *products, *token;       // [mode][row][feature]; of another walk
        Features features[max_order + 1];
    };

    std::int64_t padded() const { return rounded(rows_.tokens, chunk); }

    Parts take_parts(Arena& arena) const {
        return {arena.take<double>((call_.order + 1) * table_.width * padded()),
                arena.take<double>(call_.order * rows_.channels * padded())};
    }

    Memory take(Arena& arena) const {
        const Parts part = take_parts(arena);
        const auto reals = [&](std::int64_t count) { return arena.take<Real>(count); };
        const std::int64_t cells = rows_.channels * chunk;
        Real *values = reals(call_.order * cells), *gradient = reals(cells), *of_values = reals(call_.order * cells * width);
        Real* of_features = reals((call_.order + 1) * chunk * width);
        Real *of_columns = reals((call_.order + 1) * table_.width * chunk), *of_products = reals((table_.degree + 1) * chunk);
        Real *rows = reals(width * chunk), *running = reals(call_.order * chunk * width);
        Real *products = reals((table_.degree + 1) * Features::pitch), *token = reals(rows_.channels);
        const auto features = [&] { return Features(arena, table_, rows_.channels, 1); };
        return {part, values, gradient, of_values, of_features, of_columns, of_products, rows, running, products, token,
                {features(), features(), features(), features(), features()}};
    }

    std::int64_t thread_bytes() const {
        Arena arena(nullptr);
        take(arena);
        return rounded(arena.used(), 4096);
    }

    // Goes back through a chunk of rows and the keys that they bring, for the features [first, last).
    void pass(Memory& m, std::int64_t first, std::int64_t last, std::int64_t at, std::int64_t count) const {
        for (int t = 0; t < call_.order; ++t) {
            const RunningKeys& mode = call_.modes[t];
            m.features[t].read(mode.columns, mode.length, mode.first + at, count);
            read_running_values(mode, rows_.channels, mode.first + at, count, chunk, m.token,
                                m.values + t * rows_.channels * chunk);
        }
        m.features[call_.order].read(rows_.columns, rows_.tokens, at, count);
        for (std::int64_t s = 0; s <= table_.degree; ++s) {
            const std::int64_t low = greater(first - table_.offsets[s], 0);
            const std::int64_t high = lesser(last, table_.offsets[s + 1]) - table_.offsets[s];
            if (low < high) read_gradient(m, s, at, count);
            for (std::int64_t from = low; from < high; from += most) {
                const std::int64_t to = lesser(from + most, high);
                clear(m.of_values, call_.order * rows_.channels * chunk * width);
                clear(m.of_columns, (call_.order + 1) * table_.width * chunk);
                for (std::int64_t leaf = from; leaf < to; leaf += width)
                    go_back(m, s, leaf, lesser(leaf + width, to), leaf == low, count);
                flush(m, at);
            }
        }
    }

    // The rows' gradients, each with its share of a degree: [channel][row], zeros behind.
    void read_gradient(const Memory& m, std::int64_t s, std::int64_t at, std::int64_t count) const {
        for (std::int64_t j = 0; j < chunk; ++j) {
            const std::int64_t row = at + j;
            const double share = j < count ? back_.shares[row * (table_.degree + 1) + s] : 0.0;
            for (std::int64_t c = 0; c < rows_.channels; ++c)
                m.gradient[c * chunk + j] = j < count ? Real(share * back_.gradient[row * rows_.channels + c]) : Real(0);
        }
    }

    // The features [first, last) of degree s, at most a vector of them.
    void go_back(Memory& m, std::int64_t s, std::int64_t first, std::int64_t last, bool starts, std::int64_t count) const {
        const Real* weights = static_cast<const Real*>(call_.weights);
        for (int t = 0; t <= call_.order; ++t)
            m.features[t].make(s, first, last, starts, t == call_.order ? weights : nullptr, 0);
        clear(m.of_features, (call_.order + 1) * chunk * width);
        const std::int64_t row = table_.offsets[s] + first;
        switch (call_.order) {
            case 1: add_channels<1>(m, row, last - first, count); break;
            case 2: add_channels<2>(m, row, last - first, count); break;
            case 3: add_channels<3>(m, row, last - first, count); break;
            default: add_channels<4>(m, row, last - first, count); break;
        }
        for (int t = 0; t <= call_.order; ++t) {
            Real* rows = m.rows;  // turned, features are rows again
            for (std::int64_t j = 0; j < chunk; j += width)
                turn(m.of_features + (t * chunk + j) * width, rows + j);
            if (t == call_.order)
                for (std::int64_t i = 0; i < last - first; ++i)
                    for (std::int64_t j = 0; j < chunk; ++j) rows[i * chunk + j] *= weights[row + i];
            Ancestors<Real> walk = m.features[t].walk(m.products);
            PathGradients<Real, chunk> paths(m.of_columns + t * table_.width * chunk, m.of_products);
            for (std::int64_t i = 0; i < last - first; ++i)
                paths.take(walk, table_.degrees[s], s, first + i, rows + i * chunk);
            paths.finish(walk, s);
        }
    }

    static KORDER_INLINE void turn(const Real* from, Real* to) {
        vec<Real> square[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) square[i] = load(from + i * width);
        transpose<Real>(square);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store(to + i * chunk, square[i]);
    }

    template <int Order>
    void add_channels(const Memory& m, std::int64_t row, std::int64_t features, std::int64_t count) const {
        for (std::int64_t c = 0; c < rows_.channels; ++c) add_channel<Order>(m, row, features, c, count);
    }

    // One channel of a vector of features; everything is unrolled, or sums would not be registers.
    template <int Order>
    __attribute__((noinline)) void add_channel(const Memory& m, std::int64_t row, std::int64_t features, std::int64_t c,
                                               std::int64_t count) const {
        vec<Real> before[Order], flow[Order], grown[Order] = {};
        const Real *lanes[Order + 1], *values[Order];
        Real *of_features[Order + 1], *of_values[Order], *running[Order];
#pragma GCC unroll 5
        for (int t = 0; t <= Order; ++t)
            lanes[t] = m.features[t].lanes(), of_features[t] = m.of_features + t * chunk * width;
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t) {
            values[t] = m.values + (t * rows_.channels + c) * chunk;
            of_values[t] = m.of_values + (t * rows_.channels + c) * chunk * width;
            running[t] = m.running + t * chunk * width;
            vec<Real> sum = {};
            for (std::int64_t j = 0; j < count; ++j) {
                sum += load(lanes[t] + j * width) * values[t][j];
                store(running[t] + j * width, sum);
            }
            const std::int64_t at = row * rows_.channels + c;
            scatter_added<Real>(call_.modes[t].sums + at, rows_.channels, features, sum, -1.0);
            before[t] = gathered<Real>(call_.modes[t].sums + at, rows_.channels, features);
            flow[t] = gathered<Real>(back_.flows[t] + at, rows_.channels, features);
        }
        const Real* gradient = m.gradient + c * chunk;
        for (std::int64_t j = count - 1; j >= 0; --j) {
            const std::int64_t i = j * width;
            vec<Real> states[Order], product = spread(gradient[j]);
            const vec<Real> of_product = load(lanes[Order] + i) * product;
#pragma GCC unroll 4
            for (int t = 0; t < Order; ++t) {
                states[t] = before[t] + load(running[t] + i);
                product *= states[t];
            }
            store(of_features[Order] + i, load(of_features[Order] + i) + product);
#pragma GCC unroll 4
            for (int t = 0; t < Order; ++t) {
                vec<Real> term = of_product;
#pragma GCC unroll 4
                for (int u = 0; u < Order; ++u)
                    if (u != t) term *= states[u];
                grown[t] += term;
                const vec<Real> of_state = flow[t] + grown[t];
                store(of_features[t] + i, load(of_features[t] + i) + of_state * values[t][j]);
                store(of_values[t] + i, load(of_values[t] + i) + of_state * load(lanes[t] + i));
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < Order; ++t)
            scatter_added<Real>(back_.flows[t] + row * rows_.channels + c, rows_.channels, features, grown[t]);
    }

    // Adds what some features send to the columns and values of a chunk.
    void flush(const Memory& m, std::int64_t at) const {
        for (std::int64_t l = 0; l < (call_.order + 1) * table_.width; ++l)
            for (std::int64_t j = 0; j < chunk; j += width)
                add_wide<Real>(m.part.columns + l * padded() + at + j, nullptr, load(m.of_columns + l * chunk + j));
        for (std::int64_t c = 0; c < call_.order * rows_.channels; ++c)
            for (std::int64_t j = 0; j < chunk; j += width)
                add_wide<Real>(m.part.values + c * padded() + at + j, nullptr,
                               sums_over_lanes(m.of_values + (c * chunk + j) * width));
    }

    // Adds up the threads' parts of the rows [first, last), and writes them.
    void finish(char* memory, int threads, std::int64_t first, std::int64_t last) const {
        const auto sum = [&](double* Parts::*part, std::int64_t place) {
            double total = 0.0;
            for (int thread = 0; thread < threads; ++thread) {
                Arena arena(memory + thread * thread_bytes());
                total += (take_parts(arena).*part)[place];
            }
            return total;
        };
        for (int t = 0; t <= call_.order; ++t) {
            Real* to = static_cast<Real*>(back_.of_columns[t]);
            for (std::int64_t l = 0; l < table_.width; ++l)
                for (std::int64_t i = first; i < last; ++i)
                    to[l * rows_.tokens + i] = Real(sum(&Parts::columns, (t * table_.width + l) * padded() + i));
        }
        for (int t = 0; t < call_.order; ++t)
            for (std::int64_t c = 0; c < rows_.channels; ++c)
                for (std::int64_t i = first; i < last; ++i)
                    back_.of_values[t][i * rows_.channels + c] = sum(&Parts::values, (t * rows_.channels + c) * padded() + i);
    }

    const RunningBack& back_;
    const RunningCall& call_;
    const FeatureCall& rows_;
    const Monomials& table_;
};

}  // namespace korder::KORDER_ISA
