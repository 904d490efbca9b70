// Monomials of a block of tokens, made where they are used: one multiplication each, in memory that stays in cache.
#pragma once

#include "monomials.hpp"
#include "pack.hpp"

namespace korder::KORDER_ISA {

constexpr int most_degrees = 64;

// The columns of a block of tokens, `pitch` numbers apart and zero behind the last token, and the products along the path
// that is being walked.
template <class Real>
class Ancestors {
public:
    Ancestors(Real* columns, Real* products, const Real* ones, std::int64_t pitch)
        : columns_(columns), products_(products), pitch_(pitch) {
        at_[0] = ones;
    }

    static std::int64_t numbers(const Monomials& table, std::int64_t pitch) {
        return (table.width + table.degree + 2) * pitch;
    }

    // Reads the tokens [first, first + count), those outside [0, length) as zeros; `scratch` holds a token.
    void read(const TokenColumns& from, std::int64_t width, std::int64_t length, std::int64_t first, std::int64_t count,
              Real* scratch) {
        for (std::int64_t j = 0; j < pitch_; ++j) {
            const std::int64_t token = first + j;
            const bool there = j < count && token >= 0 && token < length && (!from.open || from.open[token]);
            if (there)
                read_row(from.number, from.rows, token * from.rows.row, width, scratch);
            else
                clear(scratch, width);
            if (from.factors)
                for (std::int64_t l = 0; l < width; ++l) columns_[l * pitch_ + j] = Real(double(scratch[l]) * from.factors[l]);
            else
                for (std::int64_t l = 0; l < width; ++l) columns_[l * pitch_ + j] = scratch[l];
        }
    }

    // Makes the products of a path's columns from step `from` up to its last but one, for `length` tokens.
    KORDER_INLINE void walk(const std::int32_t* path, std::int64_t from, std::int64_t degree, std::int64_t length) {
        for (std::int64_t s = from; s < degree; ++s) {
            const Real* column = columns_ + path[s - 1] * pitch_;
            if (s == 1) {
                at_[1] = column;
                continue;
            }
            Real* to = products_ + s * pitch_;
            for (std::int64_t j = 0; j < length; j += Vector<Real>::width)
                store(to + j, load(at_[s - 1] + j) * load(column + j));
            at_[s] = to;
        }
    }

    const Real* product(std::int64_t step) const { return at_[step]; }
    const Real* column(std::int32_t l) const { return columns_ + l * pitch_; }

private:
    Real *columns_, *products_;
    std::int64_t pitch_;
    const Real* at_[most_degrees + 1];
};

// What goes with a token: (channels) numbers, each times a factor; zeros with a closed one.
template <class Real>
void read_values(const TokenValues& from, const std::uint8_t* open, std::int64_t channels, std::int64_t token, double factor,
                 Real* to) {
    const std::int64_t read = channels - from.appends;
    if (from.appends && open && !open[token]) return clear(to, channels);
    if (from.weights) factor *= from.weights[token];
    read_scaled(from.number, from.rows, token * from.rows.row, read, factor, to);
    if (from.appends) to[read] = Real(factor);
}

// The same for a token of a call, with its share of degree s.
template <class Real>
KORDER_INLINE void read_values(const FeatureCall& call, std::int64_t s, std::int64_t token, Real* to) {
    const double share = call.shares ? call.shares[token * (call.monomials->degree + 1) + s] : 1.0;
    read_values(call.values, call.columns.open, call.channels, token, share, to);
}

template <int Rows>
struct Count {
    static constexpr int value = Rows;
};

// Calls body(Count<rows>()), for at most Rows of them.
template <int Rows, class Body>
KORDER_INLINE void by_rows(std::int64_t rows, Body body) {
    if (rows >= Rows)
        body(Count<Rows>{});
    else if constexpr (Rows > 1)
        by_rows<Rows - 1>(rows, body);
}

// to[i] += factor[i] * from[i] in double, for the lanes of one vector; without factors to[i] += from[i].
template <class Real>
KORDER_INLINE void add_wide(double* to, const double* factor, vec<Real> from) {
    constexpr int width = Vector<Real>::width;
    Real lanes[width];
    store(lanes, from);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) to[i] += factor ? factor[i] * double(lanes[i]) : double(lanes[i]);
}

}  // namespace korder::KORDER_ISA
