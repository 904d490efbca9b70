// Products of bfloat16 by the processor's own instructions: the exact forward once more, over the kernels of an instruction
// set (KORDER_REST) that do everything else. Compiled once for each kind of instruction.
#include "forward.hpp"
#include "table.hpp"

namespace korder {

namespace KORDER_REST {
extern const Table table;
}

namespace KORDER_ISA {
namespace {

std::int64_t forward_bytes(const Call& call) {
    return call.narrow ? Forward<BFloat16>(call).bytes() : KORDER_REST::table.forward_bytes(call);
}

void forward(const Call& call, char* memory) {
    if (call.narrow)
        Forward<BFloat16>(call).run(memory);
    else
        KORDER_REST::table.forward(call, memory);
}

}  // namespace

extern const NarrowForward narrow_forward;
const NarrowForward narrow_forward = {KORDER_TEXT(KORDER_ISA), forward_bytes, forward};

}  // namespace KORDER_ISA
}  // namespace korder
