// Which instruction set runs: the best one that the processor and the operating system have, or the one that is asked for.
#include <cstring>

#include "table.hpp"

namespace korder {

namespace baseline {
extern const Table table;
}
#ifdef KORDER_X86
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
#endif

namespace {

struct Entry {
    const Table* table;
    bool (*runs)();
};

// Best first. The builtins look at what the operating system keeps of the registers as well.
const Entry entries[] = {
#ifdef KORDER_X86
    {&avx512::table,
     [] {
         return bool(__builtin_cpu_supports("avx512f")) && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
     }},
    {&avx2::table, [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("bmi2"); }},
#endif
    {&baseline::table, [] { return true; }},
};

}  // namespace

const Table* find_table(const char* name) {
    for (const Entry& entry : entries)
        if ((!*name || !std::strcmp(name, entry.table->name)) && entry.runs()) return entry.table;
    return nullptr;
}

const char* const* known_names() {
    static const char* names[sizeof(entries) / sizeof(Entry) + 1] = {};
    for (std::size_t i = 0; i < sizeof(entries) / sizeof(Entry); ++i) names[i] = entries[i].table->name;
    return names;
}

bool runs_here(const char* name) { return find_table(name) != nullptr; }

}  // namespace korder
