// Sums over tokens of features times values. Threads share the features, so that each sum has one owner and one order.
#pragma once

#include "arena.hpp"
#include "features.hpp"
#include "lanes.hpp"
#include "product.hpp"

namespace korder::KORDER_ISA {

template <class Real>
class FeatureSums {
    static constexpr int width = Vector<Real>::width, column = Sizes<Real>::column, strip = Shape::rows;
    static constexpr std::int64_t tokens = 256;       // summed in Real before they join the double sums
    static constexpr std::int64_t pitch = tokens + 64 / sizeof(Real);
    static constexpr std::int64_t group = 48;         // features that stay in cache, in whole strips
    static_assert(group % strip == 0 && 2 * group % width == 0);

public:
    explicit FeatureSums(const FeatureCall& call)
        : call_(call),
          table_(*call.monomials),
          main_(call.channels / width * width),
          rest_(call.channels - main_) {}

    std::int64_t bytes() const { return call_.threads * thread_bytes(); }

    void run(char* memory) const {
#pragma omp parallel num_threads(call_.threads)
        {
            const int thread = omp_get_thread_num(), count = omp_get_num_threads();
            Arena arena(memory + thread * thread_bytes());
            const std::int64_t first = table_.count * thread / count, last = table_.count * (thread + 1) / count;
            if (first < last) add(arena, first, last);
        }
    }

private:
    struct Memory {
        Real *columns, *products, *ones, *features, *values, *rest, *weights, *token, *partial;
    };

    Memory taken(Arena& arena) const {
        Memory m;
        m.columns = arena.take<Real>(table_.width * pitch);
        m.products = arena.take<Real>((table_.degree + 1) * pitch);
        m.ones = arena.take<Real>(pitch);
        m.features = arena.take<Real>(group * pitch);
        m.values = arena.take<Real>(rounded(main_, column) * tokens);
        m.rest = arena.take<Real>((rest_ + 1) * pitch);
        m.weights = m.rest + rest_ * pitch;
        m.partial = arena.take<Real>(2 * group * width);
        m.token = arena.take<Real>(greater(table_.width, call_.channels));
        return m;
    }

    std::int64_t thread_bytes() const {
        Arena arena(nullptr);
        taken(arena);
        return rounded(arena.used(), 4096);
    }

    // Adds all tokens to the sums of the features [first, last).
    void add(Arena& arena, std::int64_t first, std::int64_t last) const {
        const Memory m = taken(arena);
        clear(m.ones, pitch, Real(1));
        Ancestors<Real> ancestors(m.columns, m.products, m.ones, pitch);
        for (std::int64_t at = 0; at < call_.tokens; at += tokens) {
            const std::int64_t count = lesser(tokens, call_.tokens - at), length = rounded(count, 2 * width);
            ancestors.read(call_.columns, table_.width, call_.tokens, at, count, m.token);
            bool packed = false;
            for (std::int64_t s = 0; s <= table_.degree; ++s) {
                const std::int64_t low = greater(first - table_.offsets[s], 0);
                const std::int64_t high = lesser(last, table_.offsets[s + 1]) - table_.offsets[s];
                if (low >= high) continue;
                if (!packed || call_.shares) pack(m, s, at, count, length);
                packed = true;
                for (std::int64_t leaf = low; leaf < high; leaf += group)
                    add_group(m, ancestors, s, leaf, lesser(leaf + group, high), low, length);
            }
        }
    }

    // values: [columns / column][token][column], rest: [column][token]; zeros behind the last token.
    void pack(const Memory& m, std::int64_t s, std::int64_t at, std::int64_t count, std::int64_t length) const {
        for (std::int64_t j = 0; j < length; ++j) {
            if (j < count)
                read_values(call_, s, at + j, m.token);
            else
                clear(m.token, call_.channels);
            std::int64_t c = 0;
            for (; c + column <= main_; c += column)
                for (int l = 0; l < column; ++l) m.values[c * length + j * column + l] = m.token[c + l];
            for (std::int64_t l = 0; c + l < main_; ++l) m.values[c * length + j * (main_ - c) + l] = m.token[c + l];
            for (std::int64_t l = 0; l < rest_; ++l) m.rest[l * pitch + j] = m.token[main_ + l];
            m.weights[j] = m.token[call_.channels - 1];
        }
    }

    void add_group(const Memory& m, Ancestors<Real>& ancestors, std::int64_t s, std::int64_t first, std::int64_t last,
                   std::int64_t start, std::int64_t length) const {
        const Degree& degree = table_.degrees[s];
        for (std::int64_t leaf = first; leaf < last; ++leaf) {
            Real* feature = m.features + (leaf - first) * pitch;
            const std::int32_t* path = degree.paths + leaf * s;
            if (s) ancestors.walk(path, leaf == start ? 1 : degree.levels[leaf], s, length);
            const Real* other = s ? ancestors.column(path[s - 1]) : m.ones;
            make(m, s ? ancestors.product(s - 1) : m.ones, other, length, feature, table_.offsets[s] + leaf, m.partial + 2 * (leaf - first) * width);
        }
        add_partial(m, table_.offsets[s] + first, last - first);
        const std::int64_t whole = rounded(last - first, strip);
        for (std::int64_t i = last - first; i < whole; ++i) clear(m.features + i * pitch, length);
        for (std::int64_t c = 0; c < main_; c += column) {
            const Real* values = m.values + c * length;
            for (std::int64_t i = 0; i < last - first; i += strip) {
                const std::int64_t count = lesser(strip, last - first - i);
                double* sums = call_.sums + (table_.offsets[s] + first + i) * call_.channels + c;
                if (c + column <= main_)
                    add_tile<Shape::columns>(m.features + i * pitch, values, length, count, sums);
                else
                    by_rows<Shape::columns>((main_ - c) / width, [&](auto vectors) {
                        add_tile<vectors.value>(m.features + i * pitch, values, length, count, sums);
                    });
            }
        }
    }

    // Makes one feature, and with it the sums that are vectors along tokens: the columns that fill no vector, and the
    // absolute one.
    KORDER_INLINE void make(const Memory& m, const Real* one, const Real* other, std::int64_t length, Real* to,
                            std::int64_t row, Real* partial) const {
        vec<Real> sizes[2] = {}, sums[2] = {};
        for (std::int64_t j = 0; j < length; j += 2 * width)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const std::int64_t i = j + v * width;
                const vec<Real> feature = load(one + i) * load(other + i);
                store(to + i, feature);
                const vec<Real> weight = load(m.weights + i);
                sums[v] += feature * weight;
                sizes[v] += absolute<Real>(feature) * weight;
            }
        store(partial, sums[0] + sums[1]), store(partial + width, sizes[0] + sizes[1]);
        double* at = call_.sums + row * call_.channels;
        for (std::int64_t c = 0; c + 1 < rest_; ++c) {
            vec<Real> sum = {};
            for (std::int64_t j = 0; j < length; j += width) sum += load(to + j) * load(m.rest + c * pitch + j);
            at[main_ + c] += double(sum_of<Real>(sum));
        }
    }

    // Adds what `make` left of the last channel and of the absolute one, lanes still apart, for `count` features.
    void add_partial(const Memory& m, std::int64_t row, std::int64_t count) const {
        for (std::int64_t v = 0; v < 2 * count; v += width) {
            Real found[width];
            store(found, sums_over_lanes(m.partial + v * width));
            for (std::int64_t l = 0; l < lesser(width, 2 * count - v); l += 2) {
                const std::int64_t at = row + (v + l) / 2;
                if (rest_) call_.sums[(at + 1) * call_.channels - 1] += double(found[l]);
                if (call_.absolute) call_.absolute[at] += double(found[l + 1]);
            }
        }
    }

    template <int Vectors>
    __attribute__((noinline)) void add_tile(const Real* features, const Real* values, std::int64_t length,
                                            std::int64_t count, double* to) const {
        Tile<Real, strip, Vectors> tile{};
        multiply(tile, features, 1, pitch, values, Vectors * width, length);
        Real part[strip][Vectors * width];
#pragma GCC unroll 8
        for (int r = 0; r < strip; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) store(part[r] + v * width, tile.at[r][v]);
        for (std::int64_t r = 0; r < count; ++r, to += call_.channels)
            for (int l = 0; l < Vectors * width; ++l) to[l] += double(part[r][l]);
    }

    const FeatureCall& call_;
    const Monomials& table_;
    std::int64_t main_, rest_;  // channels in whole vectors, and the others
};

}  // namespace korder::KORDER_ISA
