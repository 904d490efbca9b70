// Gradients of columns: those of the features are products of a table with the tokens' values, and go back along the
// paths of the monomials at once, without ever being in memory. Threads share the tokens.
#pragma once

#include "arena.hpp"
#include "features.hpp"
#include "product.hpp"

namespace korder::KORDER_ISA {

template <class Real>
class FeatureGradient {
    static constexpr int width = Vector<Real>::width, panel = Sizes<Real>::panel, strip = Shape::rows;
    static constexpr int twins = 2, pair = twins * panel;           // panels whose features are made at once
    static constexpr std::int64_t pairs = 4, block = pairs * pair;  // tokens that go through the table together
    static constexpr std::int64_t group = 120;  // features whose rows of the table stay in cache, in whole strips
    static_assert(group % strip == 0);

public:
    explicit FeatureGradient(const FeatureCall& call) : call_(call), table_(*call.monomials) {}

    std::int64_t bytes() const { return shared_bytes() + call_.threads * thread_bytes(); }

    void run(char* memory) const {
        Arena shared(memory);
        Real* rows = shared.take<Real>((table_.count + strip) * call_.channels);
        const std::int64_t blocks = pieces(call_.tokens, block);
        std::int64_t next = 0;
#pragma omp parallel num_threads(call_.threads)
        {
            const int thread = omp_get_thread_num(), count = omp_get_num_threads();
            pack(rows, table_.count * thread / count, table_.count * (thread + 1) / count);
            if (thread == 0) clear(rows + table_.count * call_.channels, strip * call_.channels);
#pragma omp barrier
            Arena arena(memory + shared_bytes() + thread * thread_bytes());
            const Memory m = taken(arena);
            clear(m.ones, pair, Real(1));
            for (std::int64_t at = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); at < blocks;
                 at = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED))
                differentiate(m, rows, at * block, lesser(block, call_.tokens - at * block));
        }
    }

private:
    struct Memory {
        Real *columns, *products, *ones, *values, *of_features, *of_products, *of_columns;
        double* totals;  // [pair][column][token]
    };

    Memory taken(Arena& arena) const {
        Memory m;
        m.columns = arena.take<Real>(block * table_.width);
        m.products = arena.take<Real>((table_.degree + 1) * pair);
        m.ones = arena.take<Real>(pair);
        m.values = arena.take<Real>(block * call_.channels);
        m.of_features = arena.take<Real>(group * pair);
        m.of_products = arena.take<Real>((table_.degree + 1) * pair);
        m.of_columns = arena.take<Real>(table_.width * pair);
        m.totals = arena.take<double>(block * table_.width);
        return m;
    }

    std::int64_t shared_bytes() const {
        Arena arena(nullptr);
        arena.take<Real>((table_.count + strip) * call_.channels);
        return rounded(arena.used(), 4096);
    }

    std::int64_t thread_bytes() const {
        Arena arena(nullptr);
        taken(arena);
        return rounded(arena.used(), 4096);
    }

    // The rows of the features [first, last) in the order of the walk.
    void pack(Real* to, std::int64_t first, std::int64_t last) const {
        const Real* table = static_cast<const Real*>(call_.table);
        for (std::int64_t s = 0; s <= table_.degree; ++s) {
            const std::int64_t low = greater(first, table_.offsets[s]), high = lesser(last, table_.offsets[s + 1]);
            for (std::int64_t leaf = low; leaf < high; ++leaf) {
                const Real* row = table + table_.degrees[s].rows[leaf - table_.offsets[s]] * call_.channels;
                for (std::int64_t c = 0; c < call_.channels; ++c) to[leaf * call_.channels + c] = row[c];
            }
        }
    }

    void differentiate(const Memory& m, const Real* rows, std::int64_t at, std::int64_t count) const {
        const std::int64_t used = pieces(count, pair);
        clear(m.totals, block * table_.width);
        for (std::int64_t p = 0; p < used; ++p)
            columns(m, p).read(static_cast<const Real*>(call_.columns), table_.width, call_.tokens, at + p * pair,
                               lesser(pair, count - p * pair));
        for (std::int64_t s = 1; s <= table_.degree; ++s) {
            if (s == 1 || call_.shares)
                for (std::int64_t p = 0; p < used; ++p) read_values(m, p, s, at, count);
            for (std::int64_t first = 0; first < table_.degrees[s].count; first += group) {
                const std::int64_t last = lesser(first + group, table_.degrees[s].count);
                for (std::int64_t p = 0; p < used; ++p) {
                    multiply_rows(m, p, rows + (table_.offsets[s] + first) * call_.channels, last - first);
                    go_back(m, p, s, first, last);
                }
            }
        }
        Real* to = static_cast<Real*>(call_.gradient);
        for (std::int64_t p = 0; p < used; ++p)
            for (std::int64_t l = 0; l < table_.width; ++l)
                for (std::int64_t j = 0; j < lesser(pair, count - p * pair); ++j)
                    to[l * call_.tokens + at + p * pair + j] = Real(m.totals[(p * table_.width + l) * pair + j]);
    }

    Ancestors<Real> columns(const Memory& m, std::int64_t p) const {
        return {m.columns + p * table_.width * pair, m.products, m.ones, pair};
    }

    // The values of a pair of tokens, each with its share of a degree: [channel][token], zeros behind the last token.
    void read_values(const Memory& m, std::int64_t p, std::int64_t s, std::int64_t at, std::int64_t count) const {
        Real* to = m.values + p * call_.channels * pair;
        for (std::int64_t j = 0; j < pair; ++j) {
            const std::int64_t token = p * pair + j;
            const std::int64_t row = (at + token) * call_.channels;
            if (token >= count) {
                for (std::int64_t c = 0; c < call_.channels; ++c) to[c * pair + j] = Real(0);
            } else if (call_.shares) {
                const double share = call_.shares[(at + token) * (table_.degree + 1) + s];
                const double* from = static_cast<const double*>(call_.values) + row;
                for (std::int64_t c = 0; c < call_.channels; ++c) to[c * pair + j] = Real(from[c] * share);
            } else {
                const Real* from = static_cast<const Real*>(call_.values) + row;
                for (std::int64_t c = 0; c < call_.channels; ++c) to[c * pair + j] = from[c];
            }
        }
    }

    // The gradients of features: [feature][token].
    __attribute__((noinline)) void multiply_rows(const Memory& m, std::int64_t p, const Real* rows,
                                                 std::int64_t count) const {
        for (std::int64_t i = 0; i < count; i += strip)
            for (std::int64_t token = 0; token < pair; token += panel) {
                Tile<Real, strip, Shape::keys> tile{};
                multiply(tile, rows + i * call_.channels, 1, call_.channels, m.values + p * call_.channels * pair + token,
                         pair, call_.channels);
                Real* to = m.of_features + i * pair + token;
#pragma GCC unroll 8
                for (int r = 0; r < strip; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < Shape::keys; ++v) store(to + r * pair + v * width, tile.at[r][v]);
            }
    }

    // Sends the gradients of the features [first, last) of degree s on to the columns along the paths.
    __attribute__((noinline)) void go_back(const Memory& m, std::int64_t p, std::int64_t s, std::int64_t first,
                                           std::int64_t last) const {
        const Degree& degree = table_.degrees[s];
        Ancestors<Real> ancestors = columns(m, p);
        clear(m.of_columns, table_.width * pair);
        const std::int32_t* open = nullptr;  // the path whose products wait for what their children send
        for (std::int64_t leaf = first; leaf < last; ++leaf) {
            const std::int32_t* path = degree.paths + leaf * s;
            const std::int64_t from = open ? degree.levels[leaf] : 1;
            if (open) close(m, ancestors, open, from, s);
            ancestors.walk(path, from, s, pair);
            clear(m.of_products + from * pair, (s - from) * pair);
            send(ancestors, m.of_features + (leaf - first) * pair, path[s - 1], s, m);
            open = path;
        }
        close(m, ancestors, open, 1, s);
        double* totals = m.totals + p * table_.width * pair;
        for (std::int64_t i = 0; i < table_.width * pair; ++i) totals[i] += double(m.of_columns[i]);
    }

    // Sends on what the products of a path have, from the last but one down to step `from`.
    KORDER_INLINE void close(const Memory& m, const Ancestors<Real>& ancestors, const std::int32_t* path,
                             std::int64_t from, std::int64_t s) const {
        for (std::int64_t step = s - 1; step >= from; --step)
            send(ancestors, m.of_products + step * pair, path[step - 1], step, m);
    }

    // The gradient of a product of `step` columns goes to the last of them and to the product of the others.
    KORDER_INLINE void send(const Ancestors<Real>& ancestors, const Real* gradient, std::int32_t l, std::int64_t step,
                            const Memory& m) const {
        Real *column = m.of_columns + l * pair, *parent = m.of_products + (step - 1) * pair;
        const Real *factor = ancestors.column(l), *product = ancestors.product(step - 1);
#pragma GCC unroll 8
        for (int v = 0; v < twins * Shape::keys; ++v) {
            const vec<Real> one = load(gradient + v * width);
            store(column + v * width, load(column + v * width) + one * load(product + v * width));
            if (step > 1) store(parent + v * width, load(parent + v * width) + one * load(factor + v * width));
        }
    }

    const FeatureCall& call_;
    const Monomials& table_;
};

}  // namespace korder::KORDER_ISA
