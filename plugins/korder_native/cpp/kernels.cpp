// The kernels of one instruction set; compiled once for each, with KORDER_ISA and the compiler's flags set to it.
#include "backward.hpp"
#include "forward.hpp"
#include "table.hpp"
#include "wild.hpp"

namespace korder::KORDER_ISA {
namespace {

std::int64_t forward_bytes(const Call& call) {
    return call.wide ? Forward<double>(call).bytes() : Forward<float>(call).bytes();
}

void forward(const Call& call, char* memory) {
    if (call.wide)
        Forward<double>(call).run(memory);
    else
        Forward<float>(call).run(memory);
}

std::int64_t backward_bytes(const Call& call) {
    return call.wide ? Backward<double>(call).bytes() : Backward<float>(call).bytes();
}

void backward(const Call& call, char* memory) {
    if (call.wide)
        Backward<double>(call).run(memory);
    else
        Backward<float>(call).run(memory);
}

std::int64_t wild_bytes(const Call& call, bool backward) {
    return call.wide ? Wild<double, std::int64_t>(call, backward).bytes() : Wild<float, std::int32_t>(call, backward).bytes();
}

bool find_wild(const Call& call, bool backward, std::uint8_t* marks, char* memory) {
    return call.wide ? Wild<double, std::int64_t>(call, backward).find(marks, memory)
                     : Wild<float, std::int32_t>(call, backward).find(marks, memory);
}

template <class Real>
void exponential_in_place(Real* numbers, std::int64_t count) {
    constexpr int width = Vector<Real>::width;
    for (std::int64_t i = 0; i < count; i += width) {
        Real lanes[width] = {};
        const std::int64_t here = lesser(width, count - i);
        for (std::int64_t j = 0; j < here; ++j) lanes[j] = numbers[i + j];
        store(lanes, exponential<Real>(load(lanes)));
        for (std::int64_t j = 0; j < here; ++j) numbers[i + j] = lanes[j];
    }
}

void exponential_of(bool wide, void* numbers, std::int64_t count) {
    if (wide)
        exponential_in_place(static_cast<double*>(numbers), count);
    else
        exponential_in_place(static_cast<float*>(numbers), count);
}

}  // namespace

#define KORDER_TEXT_OF(name) #name
#define KORDER_TEXT(name) KORDER_TEXT_OF(name)

extern const Table table;
const Table table = {KORDER_TEXT(KORDER_ISA), KORDER_VECTOR_BYTES, forward_bytes, forward, backward_bytes,
                     backward, wild_bytes, find_wild, exponential_of};

}  // namespace korder::KORDER_ISA
