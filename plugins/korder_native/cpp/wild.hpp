// Which key heads have operands that are NaN, infinite, or so large that something on the way to a result could overflow. A
// weight of zero does not make their terms zero, so the kernels leave these heads alone.
#pragma once

#include <omp.h>

#include "reading.hpp"
#include "table.hpp"

namespace korder::KORDER_ISA {

// One operand: its batches and heads as far as they differ.
struct Looked {
    Matrix rows;
    const Mode* masked = nullptr;  // whose mask leaves keys out
    std::int64_t batch = 1, heads = 1, length = 0, width = 0;
    bool closes = false;  // whether -inf only closes, as in a bias

    Looked() = default;
    Looked(const Call& call, const Matrix& from, std::int64_t heads_of, std::int64_t length_of, std::int64_t width_of,
           const Mode* mask = nullptr)
        : rows(from), masked(mask && mask->mask.data ? mask : nullptr), length(length_of), width(width_of) {
        batch = from.batch || (masked && masked->mask.batch) ? call.batch : lesser(call.batch, 1);
        heads = from.head || (masked && masked->mask.head) ? heads_of : lesser(heads_of, 1);
        if (!from.row && !masked) length = lesser(length, 1);
        if (!from.column) width = lesser(width, 1);
    }

    std::int64_t planes() const { return batch * heads; }
};

template <class Real, class Bits>
class Wild {
public:
    static constexpr int most_operands = 2 + 3 * max_order;
    static constexpr std::int64_t numbers_of_a_thread = 1 << 18;
    static constexpr double steep_scores = 0x1p15;
    static constexpr double limit = sizeof(Real) == 4 ? 0x1p120 : 0x1p1000;

    Wild(const Call& call, bool backward) : call_(call), backward_(backward) {
        add(Looked(call, call.query, call.heads, call.queries, call.width));
        add(backward ? Looked(call, call.output_gradient, call.heads, call.queries, call.value_width) : Looked());
        for (int t = 0; t < call.order; ++t) {
            const Mode& mode = call.modes[t];
            add(Looked(call, mode.keys, call.groups, mode.length, call.width, &mode));
            add(Looked(call, mode.values, call.groups, mode.length, call.value_width, &mode));
            add(mode.bias.data ? Looked(call, mode.bias, call.heads, call.queries, mode.length) : Looked());
            operands_[count_ - 1].closes = true;
        }
        std::int64_t planes = 0, numbers = 0;
        for (int o = 0; o < count_; ++o) {
            planes += operands_[o].planes();
            numbers += operands_[o].planes() * operands_[o].length * operands_[o].width;
        }
        threads_ = int(greater(1, lesser(call.threads, numbers / numbers_of_a_thread)));
        parts_ = threads_ == 1 ? 1 : greater(1, 4 * threads_ / greater(1, planes));
    }

    std::int64_t bytes() const {
        std::int64_t all = 0;
        for (int o = 0; o < count_; ++o) all += operands_[o].planes() * parts_;
        return greater(1, all) * std::int64_t(sizeof(Bits));
    }

    // Marks the heads, (batch, key head).
    Found find(std::uint8_t* marks, char* memory) const {
        Bits* found = reinterpret_cast<Bits*>(memory);
        std::int64_t firsts[most_operands + 1] = {};
        for (int o = 0; o < count_; ++o) firsts[o + 1] = firsts[o] + operands_[o].planes() * parts_;
#pragma omp parallel for num_threads(threads_) schedule(dynamic)
        for (std::int64_t at = 0; at < firsts[count_]; ++at) {
            int o = 0;
            while (at >= firsts[o + 1]) ++o;
            found[at] = largest_of_part(operands_[o], (at - firsts[o]) / parts_, (at - firsts[o]) % parts_);
        }
        Found all;
        for (std::int64_t b = 0; b < call_.batch; ++b)
            for (std::int64_t g = 0; g < call_.groups; ++g) {
                const bool wild = !is_tame(found, firsts, b, g, all.steep);
                marks[b * call_.groups + g] = wild;
                all.wild |= wild;
            }
        return all;
    }

private:
    void add(const Looked& operand) { operands_[count_++] = operand; }

    // Magnitudes of floating-point numbers are ordered as the integers that their bits are; NaN stands above infinity.
    Bits largest_of_part(const Looked& x, std::int64_t plane, std::int64_t part) const {
        constexpr std::int64_t size = 256;
        Real numbers[size];
        Bits largest = 0;
        const std::int64_t b = plane / x.heads, h = plane % x.heads, share = pieces(x.length, parts_);
        for (std::int64_t i = part * share; i < lesser(x.length, (part + 1) * share); ++i) {
            if (x.masked && !is_open(*x.masked, b, h, i)) continue;
            for (std::int64_t l = 0; l < x.width; l += size) {
                const std::int64_t count = lesser(size, x.width - l);
                read_row(call_.number, x.rows, place(x.rows, b, h, i) + l * x.rows.column, count, numbers);
                largest = x.closes ? larger_of<true>(numbers, count, largest) : larger_of<false>(numbers, count, largest);
            }
        }
        return largest;
    }

    template <bool Closes>
    static Bits larger_of(const Real* numbers, std::int64_t count, Bits largest) {
        const Bits sign = Bits(std::uint64_t(1) << (8 * sizeof(Bits) - 1));
        for (std::int64_t l = 0; l < count; ++l) {
            Bits bits;
            __builtin_memcpy(&bits, numbers + l, sizeof bits);
            Bits size = bits & ~sign;
            if (Closes) size = numbers[l] == -Real(__builtin_inff()) ? 0 : size;
            largest = size > largest ? size : largest;
        }
        return largest;
    }

    // The largest of the heads [first, last) of an operand; NaN if there is one.
    double largest_of_heads(const Bits* found, const std::int64_t* firsts, int o, std::int64_t b, std::int64_t first,
                            std::int64_t last) const {
        const Looked& x = operands_[o];
        if (!x.length || !x.width) return 0;
        if (x.heads == 1) first = 0, last = 1;
        Bits largest = 0;
        for (std::int64_t h = first; h < last; ++h)
            for (std::int64_t part = 0; part < parts_; ++part) {
                const Bits one = found[firsts[o] + ((x.batch == 1 ? 0 : b) * x.heads + h) * parts_ + part];
                largest = one > largest ? one : largest;
            }
        Real number;
        __builtin_memcpy(&number, &largest, sizeof number);
        return double(number);
    }

    // Whether no score, product of values or gradient of a key head can come near overflow. NaN is below nothing. Sets
    // `steep` if its scores may be.
    bool is_tame(const Bits* found, const std::int64_t* firsts, std::int64_t b, std::int64_t g, bool& steep) const {
        const std::int64_t share = call_.share(), first = g * share, last = first + share;
        const double scale = call_.scale < 0 ? -call_.scale : call_.scale;
        const double query = largest_of_heads(found, firsts, 0, b, first, last);
        double keys = at_least_1(query * at_least_1(scale)), scores = query * scale * double(call_.width);
        double values = 1, biases = 0;
        for (int t = 0; t < call_.order; ++t) {
            const double key = largest_of_heads(found, firsts, 2 + 3 * t, b, g, g + 1);
            keys *= at_least_1(key), scores *= key;
            values *= at_least_1(largest_of_heads(found, firsts, 3 + 3 * t, b, g, g + 1)) *
                      at_least_1(double(call_.modes[t].length));
            biases += largest_of_heads(found, firsts, 4 + 3 * t, b, first, last);
        }
        steep |= !(scores <= steep_scores);
        double products = values;
        if (backward_) {
            products *= at_least_1(largest_of_heads(found, firsts, 1, b, first, last)) * double(call_.value_width);
            products *= at_least_1(double(call_.queries)) * keys;
        }
        return double(call_.width) * keys + biases < limit && products < limit;
    }

    static double at_least_1(double x) { return x < 1 ? 1 : x; }

    const Call& call_;
    const bool backward_;
    Looked operands_[most_operands];
    int count_ = 0, threads_ = 1;
    std::int64_t parts_ = 1;
};

}  // namespace korder::KORDER_ISA
