// Gradients of columns: those of the features are products of a table with the tokens' values, and go back along the
// paths of the monomials at once, without ever being in memory. Threads share the tokens.
#pragma once

#include "arena.hpp"
#include "path_gradients.hpp"
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

    std::int64_t bytes() const { return call_.threads * thread_bytes(); }

    void run(char* memory) const {
        const std::int64_t blocks = pieces(call_.tokens, block);
        std::int64_t next = 0;
#pragma omp parallel num_threads(call_.threads)
        {
            Arena arena(memory + omp_get_thread_num() * thread_bytes());
            const Memory m = taken(arena);
            clear(m.ones, pair, Real(1));
            for (std::int64_t at = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); at < blocks;
                 at = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED))
                differentiate(m, at * block, lesser(block, call_.tokens - at * block));
        }
    }

private:
    struct Memory {
        Real *columns, *products, *ones, *values, *of_features, *of_products, *of_columns, *token;
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
        m.token = arena.take<Real>(greater(table_.width, call_.channels));
        m.totals = arena.take<double>(block * table_.width);
        return m;
    }

    std::int64_t thread_bytes() const {
        Arena arena(nullptr);
        taken(arena);
        return rounded(arena.used(), 4096);
    }

    void differentiate(const Memory& m, std::int64_t at, std::int64_t count) const {
        const std::int64_t used = pieces(count, pair);
        clear(m.totals, block * table_.width);
        for (std::int64_t p = 0; p < used; ++p)
            columns(m, p).read(call_.columns, table_.width, call_.tokens, at + p * pair, pair, m.token);
        for (std::int64_t s = 1; s <= table_.degree; ++s) {
            if (s == 1 || call_.shares)
                for (std::int64_t p = 0; p < used; ++p) read_values(m, p, s, at, count);
            for (std::int64_t first = 0; first < table_.degrees[s].count; first += group) {
                const std::int64_t last = lesser(first + group, table_.degrees[s].count);
                for (std::int64_t p = 0; p < used; ++p) {
                    multiply_rows(m, p, table_.offsets[s] + first, last - first);
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

    // The values of a pair of panels, each token's with its share of a degree: [channel][token], zeros behind the last.
    void read_values(const Memory& m, std::int64_t p, std::int64_t s, std::int64_t at, std::int64_t count) const {
        Real* to = m.values + p * call_.channels * pair;
        for (std::int64_t j = 0; j < pair; ++j) {
            if (p * pair + j < count)
                KORDER_ISA::read_values(call_, s, at + p * pair + j, m.token);
            else
                clear(m.token, call_.channels);
            for (std::int64_t c = 0; c < call_.channels; ++c) to[c * pair + j] = m.token[c];
        }
    }

    // The gradients of features from row `first` of the table on: [feature][token].
    void multiply_rows(const Memory& m, std::int64_t p, std::int64_t first, std::int64_t count) const {
        const Real* rows = static_cast<const Real*>(call_.table) + first * call_.channels;
        for (std::int64_t i = 0; i < count; i += strip)
            by_rows<strip>(count - i, [&](auto here) {
                multiply_strip<here.value>(rows + i * call_.channels, m.values + p * call_.channels * pair,
                                           m.of_features + i * pair);
            });
    }

    template <int Rows>
    __attribute__((noinline)) void multiply_strip(const Real* rows, const Real* values, Real* to) const {
        for (std::int64_t token = 0; token < pair; token += panel) {
            Tile<Real, Rows, Shape::keys> tile{};
            multiply(tile, rows, 1, call_.channels, values + token, pair, call_.channels);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < Shape::keys; ++v) store(to + r * pair + token + v * width, tile.at[r][v]);
        }
    }

    // Sends the gradients of the features [first, last) of degree s on to the columns along the paths.
    __attribute__((noinline)) void go_back(const Memory& m, std::int64_t p, std::int64_t s, std::int64_t first,
                                           std::int64_t last) const {
        Ancestors<Real> walk = columns(m, p);
        PathGradients<Real, pair> paths(m.of_columns, m.of_products);
        clear(m.of_columns, table_.width * pair);
        for (std::int64_t leaf = first; leaf < last; ++leaf)
            paths.take(walk, table_.degrees[s], s, leaf, m.of_features + (leaf - first) * pair);
        paths.finish(walk, s);
        double* totals = m.totals + p * table_.width * pair;
        for (std::int64_t i = 0; i < table_.width * pair; ++i) totals[i] += double(m.of_columns[i]);
    }

    const FeatureCall& call_;
    const Monomials& table_;
};

}  // namespace korder::KORDER_ISA
