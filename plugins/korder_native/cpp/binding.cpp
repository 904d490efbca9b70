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
using korder::Degree;
using korder::FeatureCall;
using korder::Finish;
using korder::Matrix;
using korder::Mode;
using korder::Monomials;
using korder::Number;
using korder::RunningCall;
using korder::Table;
using korder::Work;
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

std::tuple<bool, bool> find_wild(const Table& table, const Call& call, bool backward, Address marks) {
    nb::gil_scoped_release unlocked;
    const auto memory = memory_of(table.wild_bytes(call, backward));
    const korder::Found found = table.find_wild(call, backward, reinterpret_cast<std::uint8_t*>(marks), memory.get());
    return {found.wild, found.steep};
}

// Monomials and the arrays that they point at.
class OwnedMonomials {
public:
    explicit OwnedMonomials(std::int64_t width) { table_.width = width, table_.degree = -1; }
    OwnedMonomials(const OwnedMonomials&) = delete;
    OwnedMonomials& operator=(const OwnedMonomials&) = delete;

    // Adds the monomials of the next degree, `count` of them; the arrays are copied. See `Degree`.
    void add(std::int64_t count, Address paths, Address levels) {
        const std::int64_t degree = ++table_.degree;
        const auto copied = [](Address from, std::int64_t size) {
            const auto* first = reinterpret_cast<const std::int32_t*>(from);
            return std::vector<std::int32_t>(first, first + size);
        };
        arrays_.push_back({copied(paths, count * degree), copied(levels, count)});
        table_.count += count;
        offsets_.push_back(table_.count);
        const Arrays& now = arrays_.back();
        degrees_.push_back({count, now[0].data(), now[1].data()});
        table_.degrees = degrees_.data(), table_.offsets = offsets_.data();
    }

    const Monomials* get() const { return &table_; }

private:
    using Arrays = std::array<std::vector<std::int32_t>, 2>;
    Monomials table_;
    std::vector<Arrays> arrays_;
    std::vector<Degree> degrees_;
    std::vector<std::int64_t> offsets_ = {0};
};

template <class Item = void>
Item* at(const MaybeAddress& address) {
    return static_cast<Item*>(pointer_of(address));
}

FeatureCall feature_call(const OwnedMonomials& monomials, bool wide, int threads, std::int64_t tokens,
                         std::int64_t channels) {
    FeatureCall call;
    call.monomials = monomials.get();
    call.wide = wide, call.tokens = tokens, call.channels = channels;
    const double work = double(tokens) * double(channels) * double(call.monomials->count) / korder::work_of_a_thread;
    call.threads = work >= threads ? threads : work > 1 ? int(work) : 1;
    return call;
}

void run_features(const Table& table, const FeatureCall& call, Work work) {
    nb::gil_scoped_release unlocked;
    const auto memory = memory_of(table.features(call, work, nullptr));
    table.features(call, work, memory.get());
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
        .def_rw("narrow", &Call::narrow)
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
        .def_ro("narrows", &Table::narrows)
        .def_ro("vector_bytes", &Table::vector_bytes)
        .def("forward_bytes", [](const Table& table, const Call& call) { return table.forward_bytes(call); })
        .def("backward_bytes", [](const Table& table, const Call& call) { return table.backward_bytes(call); })
        .def("forward", [](const Table& table, const Call& call) { run(table, call, false); })
        .def("backward", [](const Table& table, const Call& call) { run(table, call, true); })
        .def("find_wild", &find_wild)
        .def("feature_sums",
             [](const Table& table, FeatureCall call, const MaybeAddress& shares, Address sums,
                const MaybeAddress& absolute) {
                 call.shares = at<double>(shares), call.sums = at<double>(sums), call.absolute = at<double>(absolute);
                 run_features(table, call, Work::sums);
             })
        .def("read_features",
             [](const Table& table, FeatureCall call, Address entries, Address sums, const Finish* finish) {
                 call.table = at(entries), call.sums = at<double>(sums), call.finish = finish;
                 run_features(table, call, Work::reading);
             }, nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
        .def("read_running",
             [](const Table& table, RunningCall call, Address sums, const Finish& finish) {
                 call.rows.sums = at<double>(sums), call.rows.finish = &finish;
                 nb::gil_scoped_release unlocked;
                 const auto memory = memory_of(table.running(call, nullptr));
                 table.running(call, memory.get());
             })
        .def("running_back",
             [](const Table& table, const RunningCall& call, Address gradient, Address shares,
                const std::vector<Address>& flows, const std::vector<Address>& of_columns,
                const std::vector<Address>& of_values) {
                 korder::RunningBack back;
                 back.call = call, back.gradient = at<double>(gradient), back.shares = at<double>(shares);
                 for (int t = 0; t < call.order; ++t)
                     back.flows[t] = at<double>(flows.at(t)), back.of_values[t] = at<double>(of_values.at(t));
                 for (int t = 0; t <= call.order; ++t) back.of_columns[t] = at(of_columns.at(t));
                 nb::gil_scoped_release unlocked;
                 const auto memory = memory_of(table.running_back(back, nullptr));
                 table.running_back(back, memory.get());
             })
        .def("running_bytes", [](const Table& table, const RunningCall& call) { return table.running(call, nullptr); })
        .def("feature_gradient",
             [](const Table& table, FeatureCall call, const MaybeAddress& shares, Address entries, Address gradient) {
                 call.shares = at<double>(shares), call.table = at(entries), call.gradient = at(gradient);
                 run_features(table, call, Work::gradient);
             })
        .def("column_facts",
             [](const Table& table, const FeatureCall& call, const MaybeAddress& weights, Address peaks,
                Address totals) {
                 nb::gil_scoped_release unlocked;
                 const auto token = memory_of(call.monomials->width * 8);
                 table.column_facts(call, at<double>(weights), at<double>(peaks), at<double>(totals),
                                    reinterpret_cast<double*>(token.get()));
             })
        .def("token_products",
             [](const Table& table, const FeatureCall& call, Address factors, Address products) {
                 nb::gil_scoped_release unlocked;
                 const auto token = memory_of(call.monomials->width * 8);
                 table.token_products(call, at<double>(factors), at<double>(products), reinterpret_cast<double*>(token.get()));
             })
        .def("read_table",
             [](const Table& table, const FeatureCall& call, const std::vector<Address>& sums,
                const std::vector<Address>& absolute, Address weights, double sign, Address values, Address sizes,
                Address factors, Address size_factors) {
                 korder::TableCall made;
                 made.order = int(sums.size()), made.channels = call.channels, made.sign = sign;
                 for (int t = 0; t < made.order; ++t)
                     made.sums[t] = at<double>(sums[t]), made.absolute[t] = at<double>(absolute.at(t));
                 made.weights = at<double>(weights), made.values = at(values), made.sizes = at(sizes);
                 made.factors = at<double>(factors), made.size_factors = at<double>(size_factors);
                 nb::gil_scoped_release unlocked;
                 table.read_table(*call.monomials, call.wide, made);
             })
        .def("feature_bytes", [](const Table& table, const FeatureCall& call, int work) {
            return table.features(call, Work(work), nullptr);
        })
        .def("exponential", [](const Table& table, bool wide, Address numbers, std::int64_t count) {
            table.exponential(wide, reinterpret_cast<void*>(numbers), count);
        });

    nb::class_<OwnedMonomials>(m, "Monomials")
        .def(nb::init<std::int64_t>())
        .def("add", &OwnedMonomials::add);
    nb::class_<Finish>(m, "Finish")
        .def("__init__", [](Finish* finish, Address coefficients, Address factors, Address sizes, Address size_factors,
                            Address centres, Address live, Address moments, Address magnitude) {
            new (finish) Finish{at<double>(coefficients), at<double>(factors), at(sizes), at<double>(size_factors),
                                at<double>(centres), at<std::uint8_t>(live), at<double>(moments), at<double>(magnitude)};
        });
    nb::class_<FeatureCall>(m, "FeatureCall")
        .def("__init__",
             [](FeatureCall* call, const OwnedMonomials& monomials, bool wide, int threads, std::int64_t tokens,
                std::int64_t channels) {
                 new (call) FeatureCall(feature_call(monomials, wide, threads, tokens, channels));
             }, nb::keep_alive<1, 2>())
        .def("set_columns",
             [](FeatureCall& call, const View& rows, int number, const MaybeAddress& factors, const MaybeAddress& open) {
                 call.columns = {matrix_of(rows), Number(number), at<double>(factors), at<std::uint8_t>(open)};
             })
        .def("set_values",
             [](FeatureCall& call, const View& rows, int number, bool appends, const MaybeAddress& weights) {
                 call.values = {matrix_of(rows), Number(number), appends, at<double>(weights)};
             });

    nb::class_<RunningCall>(m, "RunningCall")
        .def("__init__",
             [](RunningCall* call, const FeatureCall& rows, const MaybeAddress& weights) {
                 new (call) RunningCall();
                 call->rows = rows, call->weights = at(weights);
             }, nb::keep_alive<1, 2>())
        .def("add_mode", [](RunningCall& call, const FeatureCall& keys, std::int64_t first, const MaybeAddress& sums,
                            const MaybeAddress& absolute) {
            if (call.order == korder::max_order) throw nb::value_error("too many modes");
            call.modes[call.order++] = {keys.columns, keys.values, first, keys.tokens, at<double>(sums), at<double>(absolute)};
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
