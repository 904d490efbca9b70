// Memory of one call, handed out piece by piece; without memory it only counts how much would be needed.
#pragma once

#include "vector.hpp"

namespace korder::KORDER_ISA {

class Arena {
public:
    explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <class Item>
    Item* take(std::int64_t count) {
        Item* found = memory_ ? reinterpret_cast<Item*>(memory_ + used_) : nullptr;
        // a line apart, so that threads do not write to one line and no product reads past the end
        used_ += (count * std::int64_t(sizeof(Item)) + 63) / 64 * 64 + 64;
        return found;
    }

    std::int64_t used() const { return used_; }

private:
    char* memory_;
    std::int64_t used_ = 0;
};

}  // namespace korder::KORDER_ISA
