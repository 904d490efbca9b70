// One call of a kernel as plain numbers: what Python hands over, and what the kernels of every instruction set read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace korder {

constexpr int max_order = 4;
constexpr double work_of_a_thread = 1 << 20;  // multiplications below which another thread does not pay

enum class Kind : int { full, causal, window, ordered };
enum class Number : int { float32, float64, bfloat16 };

// (batch, head, row, column) of somebody's memory; strides in elements, 0 along an axis that is shared.
struct Matrix {
    const void* data = nullptr;
    std::int64_t batch = 0, head = 0, row = 0, column = 0;
};

struct Mode {
    Matrix keys, values;
    Matrix mask;          // bool, (batch, key head, -, key)
    Matrix bias;          // (batch, query head, query, key)
    bool by_row = false;  // whether the bias differs between queries
    std::int64_t length = 0, offset = 0, window = 0;
};

// The modes stand in the user's order, but for the contracted one, which is the last; `before` of the others precede it.
struct Call {
    int order = 1, before = 0;
    Kind kind = Kind::full;
    Number number = Number::float32;
    bool wide = false;  // whether sums are float64
    bool narrow = false;  // whether products may be of bfloat16, where the instruction set has them
    int threads = 1;
    std::int64_t memory = INT64_MAX;  // bytes that it may take beyond operands and results, where it can work in them
    std::int64_t batch = 0, heads = 0, groups = 0, queries = 0, width = 0, value_width = 0;
    std::int64_t query_offset = 0;
    double scale = 1.0;
    Matrix query;
    Mode modes[max_order];
    const std::uint8_t* skipped = nullptr;  // (batch, key head): what is left to somebody else, whose results stay
    // Dense, in the dtype of the sums. Forward writes output and lse, backward reads them.
    void* output = nullptr;
    void* lse = nullptr;
    // Backward: the gradients that come in, and those that go out; null where nobody wants them. They are added to.
    Matrix output_gradient;
    const void* lse_gradient = nullptr;
    void* query_gradient = nullptr;
    void* keys_gradient[max_order] = {};
    void* values_gradient[max_order] = {};
    void* bias_gradient[max_order] = {};
    std::int64_t bias_batch[max_order] = {}, bias_head[max_order] = {};  // strides; 0 if all batches or heads share it

    std::int64_t share() const { return groups ? heads / groups : 0; }
    bool skips(std::int64_t head) const { return skipped && skipped[head]; }
    const Mode& contracted() const { return modes[order - 1]; }
    int outer() const { return order - 1; }
};

}  // namespace korder
