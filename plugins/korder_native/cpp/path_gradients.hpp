// Gradients of monomials on their way back to the columns, along the paths that they were made on.
#pragma once

#include "features.hpp"

namespace korder::KORDER_ISA {

// `of_columns` is added to, [column][token]; `of_products` holds the gradients of the products of the open path.
template <class Real, int Tokens>
class PathGradients {
    static constexpr int width = Vector<Real>::width;

public:
    PathGradients(Real* of_columns, Real* of_products) : of_columns_(of_columns), of_products_(of_products) {}

    // Takes the gradient of a monomial of degree s; those of a degree come in the order of the table, finished at any place.
    KORDER_INLINE void take(Ancestors<Real>& walk, const Degree& degree, std::int64_t s, std::int64_t leaf,
                            const Real* gradient) {
        if (s == 0) return;
        const std::int32_t* path = degree.paths + leaf * s;
        const std::int64_t from = open_ ? degree.levels[leaf] : 1;
        if (open_) close(walk, from, s);
        walk.walk(path, from, s, Tokens);
        clear(of_products_ + from * Tokens, (s - from) * Tokens);
        send(walk, gradient, path[s - 1], s);
        open_ = path;
    }

    // Sends on what still waits.
    KORDER_INLINE void finish(const Ancestors<Real>& walk, std::int64_t s) {
        if (open_) close(walk, 1, s);
        open_ = nullptr;
    }

private:
    // Sends on what the products of the open path have, from the last but one down to step `from`.
    KORDER_INLINE void close(const Ancestors<Real>& walk, std::int64_t from, std::int64_t s) const {
        for (std::int64_t step = s - 1; step >= from; --step) send(walk, of_products_ + step * Tokens, open_[step - 1], step);
    }

    // The gradient of a product of `step` columns goes to the last of them and to the product of the others.
    KORDER_INLINE void send(const Ancestors<Real>& walk, const Real* gradient, std::int32_t l, std::int64_t step) const {
        Real *column = of_columns_ + l * Tokens, *parent = of_products_ + (step - 1) * Tokens;
        const Real *factor = walk.column(l), *product = walk.product(step - 1);
#pragma GCC unroll 8
        for (int v = 0; v < Tokens; v += width) {
            const vec<Real> one = load(gradient + v);
            store(column + v, load(column + v) + one * load(product + v));
            if (step > 1) store(parent + v, load(parent + v) + one * load(factor + v));
        }
    }

    Real *of_columns_, *of_products_;
    const std::int32_t* open_ = nullptr;
};

}  // namespace korder::KORDER_ISA
