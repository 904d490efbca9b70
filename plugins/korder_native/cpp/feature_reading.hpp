// What tokens read of a table with one row for each feature: for every degree the features times the table, each token's
// share of them, and the sum over degrees. The share is what the power has in the polynomial of the token's centred score.
// Threads share the tokens.
#pragma once

#include "arena.hpp"
#include "centred.hpp"
#include "features.hpp"
#include "product.hpp"

namespace korder::KORDER_ISA {

template <class Real>
class FeatureReading {
    static constexpr int width = Vector<Real>::width, panel = Sizes<Real>::panel, strip = Shape::rows;
    static constexpr int twins = 2, pair = twins * panel;             // panels whose features are made at once
    static constexpr std::int64_t pairs = 4, block = pairs * pair;    // tokens that go through the table together
    // Features that stay in the first cache; not more terms than sums in Real may have.
    static constexpr std::int64_t room = (24 << 10) / (pair * sizeof(Real)), group = room < 256 ? room : 256;

public:
    explicit FeatureReading(const FeatureCall& call) : call_(call), table_(*call.monomials) {}

    std::int64_t bytes() const { return shared_bytes() + call_.threads * thread_bytes(); }

    void run(char* memory) const {
        Arena shared(memory);
        Real* packed = shared.take<Real>(table_.count * call_.channels);
        const std::int64_t blocks = pieces(call_.tokens, block);
        std::int64_t next = 0;
#pragma omp parallel num_threads(call_.threads)
        {
            const int thread = omp_get_thread_num(), count = omp_get_num_threads();
            pack(packed, table_.count * thread / count, table_.count * (thread + 1) / count);
#pragma omp barrier
            Arena arena(memory + shared_bytes() + thread * thread_bytes());
            const Memory m = taken(arena);
            clear(m.ones, pair, Real(1));
            for (std::int64_t at = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); at < blocks;
                 at = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED))
                read(m, packed, at * block, lesser(block, call_.tokens - at * block));
        }
    }

private:
    struct Memory {
        Real *columns, *products, *ones, *features, *token;
        double *totals, *last, *sizes, *shares;  // [channel or degree][token of the block]
    };

    Memory taken(Arena& arena) const {
        Memory m;
        m.columns = arena.take<Real>(block * table_.width);
        m.products = arena.take<Real>((table_.degree + 1) * pair);
        m.ones = arena.take<Real>(pair);
        m.features = arena.take<Real>(group * pair);
        m.token = arena.take<Real>(table_.width);
        m.totals = arena.take<double>(call_.channels * block);
        m.last = arena.take<double>((table_.degree + 1) * block);
        m.sizes = arena.take<double>((table_.degree + 1) * block);
        m.shares = arena.take<double>((table_.degree + 1) * block);
        return m;
    }

    std::int64_t shared_bytes() const {
        Arena arena(nullptr);
        arena.take<Real>(table_.count * call_.channels);
        return rounded(arena.used(), 4096);
    }

    std::int64_t thread_bytes() const {
        Arena arena(nullptr);
        taken(arena);
        return rounded(arena.used(), 4096);
    }

    // The rows of the features [first, last): [degree][channels / strip][feature][strip], the last strip narrower.
    void pack(Real* to, std::int64_t first, std::int64_t last) const {
        const Real* table = static_cast<const Real*>(call_.table);
        for (std::int64_t s = 0; s <= table_.degree; ++s) {
            const std::int64_t start = table_.offsets[s], count = table_.degrees[s].count;
            for (std::int64_t row = greater(first, start); row < lesser(last, start + count); ++row)
                for (std::int64_t c = 0; c < call_.channels; c += strip) {
                    const std::int64_t here = lesser(strip, call_.channels - c);
                    Real* at = to + start * call_.channels + c * count + (row - start) * here;
                    for (std::int64_t l = 0; l < here; ++l) at[l] = table[row * call_.channels + c + l];
                }
        }
    }

    void read(const Memory& m, const Real* packed, std::int64_t at, std::int64_t count) const {
        const std::int64_t degrees = table_.degree + 1, used = pieces(count, pair);
        const Real* sizes = call_.finish ? static_cast<const Real*>(call_.finish->sizes) : nullptr;
        clear(m.totals, call_.channels * block), clear(m.last, degrees * block), clear(m.sizes, degrees * block);
        clear(m.shares, degrees * block, call_.finish ? 0.0 : 1.0);
        for (std::int64_t j = 0; call_.finish && j < count; ++j)
            centred_shares(*call_.finish, table_.degree, call_.finish->centres[at + j], m.shares + j, block);
        for (std::int64_t p = 0; p < used; ++p)
            columns(m, p).read(call_.columns, table_.width, call_.tokens, at + p * pair, pair, m.token);
        for (std::int64_t s = 0; s < degrees; ++s)
            for (std::int64_t first = 0; first < table_.degrees[s].count; first += group) {
                const std::int64_t last = lesser(first + group, table_.degrees[s].count);
                for (std::int64_t p = 0; p < used; ++p) {
                    make(m, p, s, first, last, sizes ? sizes + table_.offsets[s] : nullptr);
                    add(m, p, s, first, last, packed + table_.offsets[s] * call_.channels);
                }
            }
        finish(m, at, count);
    }

    Ancestors<Real> columns(const Memory& m, std::int64_t p) const {
        return {m.columns + p * table_.width * pair, m.products, m.ones, pair};
    }

    // Makes the features [first, last) of a panel of tokens: [feature][token]; adds what their sizes read.
    void make(const Memory& m, std::int64_t p, std::int64_t s, std::int64_t first, std::int64_t last,
              const Real* sizes) const {
        const Degree& degree = table_.degrees[s];
        Ancestors<Real> ancestors = columns(m, p);
        vec<Real> absolutes[twins * Shape::keys] = {};
        for (std::int64_t leaf = first; leaf < last; ++leaf) {
            const std::int32_t* path = degree.paths + leaf * s;
            if (s) ancestors.walk(path, leaf == first ? 1 : degree.levels[leaf], s, pair);
            const Real *one = s ? ancestors.product(s - 1) : m.ones, *other = s ? ancestors.column(path[s - 1]) : m.ones;
            Real* to = m.features + (leaf - first) * pair;
#pragma GCC unroll 8
            for (int v = 0; v < twins * Shape::keys; ++v) {
                const vec<Real> feature = load(one + v * width) * load(other + v * width);
                store(to + v * width, feature);
                if (sizes) absolutes[v] += absolute<Real>(feature) * sizes[leaf];
            }
        }
        if (!sizes) return;
        for (int v = 0; v < twins * Shape::keys; ++v)
            add_wide<Real>(m.sizes + s * block + p * pair + v * width, nullptr, absolutes[v]);
    }

    void add(const Memory& m, std::int64_t p, std::int64_t s, std::int64_t first, std::int64_t last,
             const Real* packed) const {
        const std::int64_t of_degree = table_.degrees[s].count;
        for (std::int64_t c = 0; c < call_.channels; c += strip)
            by_rows<strip>(call_.channels - c, [&](auto rows) {
                add_strip<rows.value>(m, p, s, c, packed + c * of_degree + first * rows.value, last - first);
            });
    }

    template <int Rows>
    __attribute__((noinline)) void add_strip(const Memory& m, std::int64_t p, std::int64_t s, std::int64_t c,
                                             const Real* packed, std::int64_t length) const {
        for (std::int64_t token = 0; token < pair; token += panel) {
            Tile<Real, Rows, Shape::keys> tile{};
            multiply(tile, packed, Rows, 1, m.features + token, pair, length);
            const std::int64_t at = p * pair + token;
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < Shape::keys; ++v)
                    add_wide<Real>(m.totals + (c + r) * block + at + v * width, m.shares + s * block + at + v * width,
                                   tile.at[r][v]);
            if (c + Rows < call_.channels) continue;
#pragma GCC unroll 4
            for (int v = 0; v < Shape::keys; ++v)
                add_wide<Real>(m.last + s * block + at + v * width, nullptr, tile.at[Rows - 1][v]);
        }
    }

    // Writes a block: finished rows, or the sums themselves.
    void finish(const Memory& m, std::int64_t at, std::int64_t count) const {
        for (std::int64_t j = 0; j < count; ++j) {
            if (call_.finish) {
                finish_row(*call_.finish, table_.degree, call_.channels, at + j, m.totals + j, m.last + j, m.sizes + j, block,
                           call_.sums);
                continue;
            }
            double* to = call_.sums + (at + j) * call_.channels;
            for (std::int64_t c = 0; c < call_.channels; ++c) to[c] = m.totals[c * block + j];
        }
    }

    const FeatureCall& call_;
    const Monomials& table_;
};

}  // namespace korder::KORDER_ISA
