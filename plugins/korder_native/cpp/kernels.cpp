// The kernels of one instruction set; compiled once for each, with KORDER_ISA and the compiler's flags set to it.
#include "backward.hpp"
#include "feature_gradient.hpp"
#include "feature_reading.hpp"
#include "feature_running.hpp"
#include "feature_running_back.hpp"
#include "feature_sums.hpp"
#include "forward.hpp"
#include "read_table.hpp"
#include "table.hpp"
#include "token_facts.hpp"
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

Found find_wild(const Call& call, bool backward, std::uint8_t* marks, char* memory) {
    return call.wide ? Wild<double, std::int64_t>(call, backward).find(marks, memory)
                     : Wild<float, std::int32_t>(call, backward).find(marks, memory);
}

// Without memory a kernel only says how much it would take.
template <class Kernel>
std::int64_t run_in(const Kernel& kernel, char* memory) {
    if (memory) kernel.run(memory);
    return kernel.bytes();
}

template <class Real>
std::int64_t features_in(const FeatureCall& call, Work work, char* memory) {
    switch (work) {
        case Work::sums: return run_in(FeatureSums<Real>(call), memory);
        case Work::reading: return run_in(FeatureReading<Real>(call), memory);
        case Work::gradient: return run_in(FeatureGradient<Real>(call), memory);
    }
    return 0;
}

std::int64_t features(const FeatureCall& call, Work work, char* memory) {
    return call.wide ? features_in<double>(call, work, memory) : features_in<float>(call, work, memory);
}

std::int64_t running(const RunningCall& call, char* memory) {
    return call.rows.wide ? run_in(FeatureRunning<double>(call), memory) : run_in(FeatureRunning<float>(call), memory);
}

std::int64_t running_back(const RunningBack& back, char* memory) {
    return back.call.rows.wide ? run_in(FeatureRunningBack<double>(back), memory)
                               : run_in(FeatureRunningBack<float>(back), memory);
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

extern const Table table;
const Table table = {KORDER_TEXT(KORDER_ISA), KORDER_VECTOR_BYTES, forward_bytes, forward, backward_bytes,
                     backward, wild_bytes, find_wild, features, running, running_back, column_facts, token_products,
                     read_table, exponential_of, false};

}  // namespace korder::KORDER_ISA
