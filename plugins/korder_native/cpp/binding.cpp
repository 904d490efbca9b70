// The module that Python sees: a call as numbers and addresses, run without the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "table.hpp"

namespace nb = nanobind;

namespace {

using korder::Call;
using korder::Matrix;
using korder::Mode;
using korder::Table;
using Address = std::uintptr_t;
using View = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using MaybeView = std::optional<View>;
using MaybeAddress = std::optional<Address>;

Matrix matrix_of(const MaybeView& view) {
    if (!view) return {};
    const auto& [data, batch, head, row, column] = *view;
    return {reinterpret_cast<const void*>(data), batch, head, row, column};
}

void* pointer_of(const MaybeAddress& address) { return address ? reinterpret_cast<void*>(*address) : nullptr; }

struct Free {
    void operator()(char* memory) const { std::free(memory); }
};

std::unique_ptr<char, Free> memory_of(std::int64_t bytes) {
    const std::size_t size = (std::size_t(bytes) + 4095) / 4096 * 4096;
    auto* memory = static_cast<char*>(std::aligned_alloc(4096, size ? size : 4096));
    if (!memory) throw std::bad_alloc();
    return std::unique_ptr<char, Free>(memory);
}

const Table& table_of(const std::string& isa) {
    const Table* table = korder::find_table(isa.c_str());
    if (!table) throw nb::value_error(("no kernels for instruction set '" + isa + "' can run here").c_str());
    return *table;
}

void set_mode(Call& call, int t, std::int64_t length, std::int64_t window, bool by_row) {
    Mode& mode = call.modes[t];
    mode.length = length, mode.window = window, mode.by_row = by_row;
}

void set_operands(Call& call, const View& query, const std::vector<View>& keys, const std::vector<View>& values,
                  const std::vector<MaybeView>& masks, const std::vector<MaybeView>& biases, std::int64_t query_offset,
                  const std::vector<std::int64_t>& key_offsets) {
    call.query = matrix_of(query);
    call.query_offset = query_offset;
    for (int t = 0; t < call.order; ++t) {
        Mode& mode = call.modes[t];
        mode.keys = matrix_of(keys.at(t)), mode.values = matrix_of(values.at(t));
        mode.mask = matrix_of(masks.at(t)), mode.bias = matrix_of(biases.at(t));
        mode.offset = key_offsets.at(t);
    }
}

void set_gradients(Call& call, const View& output, const MaybeAddress& lse, const MaybeAddress& query,
                   const std::vector<MaybeAddress>& keys, const std::vector<MaybeAddress>& values,
                   const std::vector<MaybeView>& biases) {
    call.output_gradient = matrix_of(output);
    call.lse_gradient = pointer_of(lse);
    call.query_gradient = pointer_of(query);
    for (int t = 0; t < call.order; ++t) {
        call.keys_gradient[t] = pointer_of(keys.at(t));
        call.values_gradient[t] = pointer_of(values.at(t));
        const auto [data, batch, head, row, column] = biases.at(t).value_or(View{});
        call.bias_gradient[t] = reinterpret_cast<void*>(data);
        call.bias_batch[t] = batch, call.bias_head[t] = head;
    }
}

void run(const Table& table, const Call& call, bool backward) {
    nb::gil_scoped_release unlocked;
    const auto memory = memory_of(backward ? table.backward_bytes(call) : table.forward_bytes(call));
    (backward ? table.backward : table.forward)(call, memory.get());
}

bool find_wild(const Table& table, const Call& call, bool backward, Address marks) {
    nb::gil_scoped_release unlocked;
    const auto memory = memory_of(table.wild_bytes(call, backward));
    return table.find_wild(call, backward, reinterpret_cast<std::uint8_t*>(marks), memory.get());
}

}  // namespace

NB_MODULE(_native, m) {
    // korder keeps kernels until the interpreter ends, and says nothing of it; so need we not.
    nb::set_leak_warnings(false);
    m.doc() = "C++ kernels of order-k attention; addresses and strides in, results written where they are told to.";

    nb::class_<Call>(m, "Call")
        .def(nb::init<>())
        .def_rw("order", &Call::order)
        .def_rw("before", &Call::before)
        .def_rw("wide", &Call::wide)
        .def_rw("threads", &Call::threads)
        .def_rw("batch", &Call::batch)
        .def_rw("heads", &Call::heads)
        .def_rw("groups", &Call::groups)
        .def_rw("queries", &Call::queries)
        .def_rw("width", &Call::width)
        .def_rw("value_width", &Call::value_width)
        .def_rw("scale", &Call::scale)
        .def_rw("memory", &Call::memory)
        .def_prop_rw("kind", [](const Call& call) { return int(call.kind); },
                     [](Call& call, int kind) { call.kind = korder::Kind(kind); })
        .def_prop_rw("number", [](const Call& call) { return int(call.number); },
                     [](Call& call, int number) { call.number = korder::Number(number); })
        .def("set_mode", &set_mode)
        .def("set_operands", &set_operands)
        .def("set_results",
             [](Call& call, Address output, Address lse) {
                 call.output = reinterpret_cast<void*>(output), call.lse = reinterpret_cast<void*>(lse);
             })
        .def("set_gradients", &set_gradients)
        .def("skip", [](Call& call, Address marks) { call.skipped = reinterpret_cast<const std::uint8_t*>(marks); });

    nb::class_<Table>(m, "Kernels")
        .def_ro("name", &Table::name)
        .def_ro("vector_bytes", &Table::vector_bytes)
        .def("forward_bytes", [](const Table& table, const Call& call) { return table.forward_bytes(call); })
        .def("backward_bytes", [](const Table& table, const Call& call) { return table.backward_bytes(call); })
        .def("forward", [](const Table& table, const Call& call) { run(table, call, false); })
        .def("backward", [](const Table& table, const Call& call) { run(table, call, true); })
        .def("find_wild", &find_wild)
        .def("exponential", [](const Table& table, bool wide, Address numbers, std::int64_t count) {
            table.exponential(wide, reinterpret_cast<void*>(numbers), count);
        });

    m.def("kernels", &table_of, nb::rv_policy::reference);
    m.def("known_names", [] {
        std::vector<std::string> found;
        for (const char* const* name = korder::known_names(); *name; ++name) found.emplace_back(*name);
        return found;
    });
    m.def("runs_here", [](const std::string& isa) { return korder::runs_here(isa.c_str()); });
    m.def("thread_limit", [] { return omp_get_max_threads(); });
}
