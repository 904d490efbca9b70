// What every instruction set offers: the same functions, compiled for it.
#pragma once

#include "call.hpp"
#include "monomials.hpp"

#define KORDER_TEXT_OF(name) #name
#define KORDER_TEXT(name) KORDER_TEXT_OF(name)

namespace korder {

// What was seen of operands: key heads that are marked, and scores so large that two orders of summation may differ by
// as much as bfloat16 rounds.
struct Found {
    bool wild = false, steep = false;
};

struct Table {
    const char* name;
    int vector_bytes;
    std::int64_t (*forward_bytes)(const Call&);
    void (*forward)(const Call&, char* memory);
    std::int64_t (*backward_bytes)(const Call&);
    void (*backward)(const Call&, char* memory);
    std::int64_t (*wild_bytes)(const Call&, bool backward);
    Found (*find_wild)(const Call&, bool backward, std::uint8_t* marks, char* memory);

    // Without memory these only say how much they would take.
    std::int64_t (*features)(const FeatureCall&, Work, char* memory);
    std::int64_t (*running)(const RunningCall&, char* memory);
    std::int64_t (*running_back)(const RunningBack&, char* memory);

    void (*column_facts)(const FeatureCall&, const double* weights, double* peaks, double* totals, double* token);
    void (*token_products)(const FeatureCall&, const double* factors, double* to, double* token);
    void (*read_table)(const Monomials&, bool wide, const TableCall&);
    void (*exponential)(bool wide, void* numbers, std::int64_t count);
    bool narrows;  // whether it has products of bfloat16
};

// What a set with products of bfloat16 has of its own; a constant, because code of the set must not run where it is loaded.
struct NarrowForward {
    const char* name;
    std::int64_t (*bytes)(const Call&);
    void (*run)(const Call&, char* memory);

    Table over(Table rest) const {
        rest.name = name, rest.forward_bytes = bytes, rest.forward = run, rest.narrows = true;
        return rest;
    }
};

// The best instruction set that this processor has, or the one that is named; null if there is none such here.
const Table* find_table(const char* name);

// The names that this build has, null at the end, and which of them this processor has.
const char* const* known_names();
bool runs_here(const char* name);

}  // namespace korder
