// Which instruction set runs: the best one that the processor and the operating system have, or the one that is asked for.
#include <cstring>

#include "table.hpp"

#if defined(KORDER_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef KORDER_AVX512_BF16
namespace avx512_bf16 {
extern const NarrowForward narrow_forward;
}
const Table with_avx512_bf16 = avx512_bf16::narrow_forward.over(avx512::table);
#endif
#ifdef KORDER_AMX
namespace amx_bf16 {
extern const NarrowForward narrow_forward;
}
const Table with_amx_bf16 = amx_bf16::narrow_forward.over(avx512::table);
#endif
#ifdef KORDER_EMULATED
namespace emulated_pairs {
extern const NarrowForward narrow_forward;
}
const Table with_emulated_pairs = emulated_pairs::narrow_forward.over(baseline::table);
namespace emulated_tiles {
extern const NarrowForward narrow_forward;
}
const Table with_emulated_tiles = emulated_tiles::narrow_forward.over(baseline::table);
#endif

namespace {

#ifdef KORDER_X86
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

// The builtins look at what the operating system keeps of the registers as well.
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef KORDER_AVX512_BF16
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Where a product of pairs is said to take as long as one of float32. On the Xeon that was measured it takes four times as
// long, which only AMX makes up for.
bool gains_by_avx512_bf16() { return __builtin_cpu_is("amd"); }
#endif

#ifdef KORDER_AMX
// Linux keeps the matrix registers of a process that has asked for them.
bool has_amx() {
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    constexpr long ask_for_state = 0x1023, matrix_registers = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    static const bool granted = syscall(SYS_arch_prctl, ask_for_state, matrix_registers) == 0;
    return (d & amx_bf16) && (d & amx_tile) && granted;
}
#endif

bool always() { return true; }

struct Entry {
    const Table* table;
    bool (*runs)();
    bool (*gains)() = always;  // else it runs only where it is asked for

    bool answers(const char* name) const {
        return (*name ? !std::strcmp(name, table->name) : gains()) && runs();
    }
};

// Best first; what only emulates instructions, for tests, comes last.
const Entry entries[] = {
#ifdef KORDER_AMX
    {&with_amx_bf16, has_amx},
#endif
#ifdef KORDER_AVX512_BF16
    {&with_avx512_bf16, has_avx512_bf16, gains_by_avx512_bf16},
#endif
#ifdef KORDER_X86
    {&avx512::table, has_avx512},
    {&avx2::table, has_avx2},
#endif
    {&baseline::table, always},
#ifdef KORDER_EMULATED
    {&with_emulated_pairs, always},
    {&with_emulated_tiles, always},
#endif
};

}  // namespace

const Table* find_table(const char* name) {
    for (const Entry& entry : entries)
        if (entry.answers(name)) return entry.table;
    return nullptr;
}

const char* const* known_names() {
    static const char* names[sizeof(entries) / sizeof(Entry) + 1] = {};
    for (std::size_t i = 0; i < sizeof(entries) / sizeof(Entry); ++i) names[i] = entries[i].table->name;
    return names;
}

bool runs_here(const char* name) { return find_table(name) != nullptr; }

}  // namespace korder
