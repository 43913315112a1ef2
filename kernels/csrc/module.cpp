// Bindings. Tensors come as addresses: handing over a tensor object costs microseconds per argument, and Python has
// checked device, dtype, size and contiguity before and keeps the tensors alive during the call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "active.h"
#include "bitmask.h"
#include "csr.h"
#include "dual.h"
#include "entries.h"
#include "gemv.h"
#include "memory.h"
#include "neuron.h"
#include "norm.h"
#include "parallel.h"
#include "step.h"
#include "tiers.h"
#include "tiles.h"
#include "watch.h"
#include "window.h"

namespace nb = nanobind;

namespace {

// Raised whenever a signature changes, so that a stale build is noticed (kernels/extension.py).
constexpr int kInterface = 13;

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

using Bytes = std::uint8_t;

void define_bitmask(nb::module_& m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    namespace bm = gossamer::bitmask;
    m.def("bitmask_pack", [](Address mask, std::int64_t rows, std::int64_t cols, Address bits) {
        bm::pack(at<const Bytes>(mask), rows, cols, at<Bytes>(bits));
    }, unlocked);
    m.def("bitmask_unpack", [](Address bits, std::int64_t rows, std::int64_t cols, Address mask) {
        bm::unpack(at<const Bytes>(bits), rows, cols, at<Bytes>(mask));
    }, unlocked);
    m.def("bitmask_row_counts", [](Address bits, std::int64_t rows, std::int64_t width, Address counts) {
        bm::row_counts(at<const Bytes>(bits), rows, width, at<std::int64_t>(counts));
    }, unlocked);
    m.def("bitmask_compress", [](Address weight, Address bits, std::int64_t rows, std::int64_t cols,
                                 std::int64_t element, Address values, std::int64_t capacity) {
        return bm::compress(at<const void>(weight), at<const Bytes>(bits), rows, cols, element, at<void>(values),
                            capacity);
    }, unlocked);
    m.def("bitmask_expand", [](Address values, Address bits, std::int64_t rows, std::int64_t cols,
                               std::int64_t element, Address weight, std::int64_t count) {
        return bm::expand(at<const void>(values), at<const Bytes>(bits), rows, cols, element, at<void>(weight), count);
    }, unlocked);
}

void define_tiles(nb::module_& m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    namespace t = gossamer::tiles;
    m.def("tiles_size", [](std::int64_t rows, std::int64_t cols, std::int64_t nnz, std::int64_t dtype) {
        return t::Shape(rows, cols, dtype).size(nnz);
    });
    m.def("tiles_fault", [](Address packed, std::int64_t size) { return t::find_fault(at<const Bytes>(packed), size); },
          unlocked);
    m.def("tiles_pack", [](Address bits, Address values, Address scales, std::int64_t nnz, std::int64_t rows,
                           std::int64_t cols, std::int64_t dtype, Address packed) {
        return t::pack(at<const Bytes>(bits), at<const void>(values), at<const std::uint16_t>(scales), nnz, rows, cols,
                       dtype, at<Bytes>(packed));
    }, unlocked);
    m.def("tiles_unpack", [](Address packed, Address bits, Address values, Address scales) {
        t::unpack(at<const Bytes>(packed), at<Bytes>(bits), at<void>(values), at<std::uint16_t>(scales));
    }, unlocked);
}

// Tiers are addresses to Python as well: those that `tiers` gave.
void define_gemv(nb::module_& m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    namespace g = gossamer;
    m.def("prefer_huge_pages", [](Address memory, std::int64_t size) { g::prefer_huge_pages(at<void>(memory), size); });
    m.def("parallel_runtime", g::parallel_runtime);
    m.def("tiers", [] {
        nb::list found;
        for (int i = 0; i < g::kTiers; ++i) {
            const g::Tier* tier = g::tier_at(i);
            if (tier != nullptr) found.append(nb::make_tuple(tier->name, reinterpret_cast<Address>(tier)));
        }
        return found;
    });
    m.def("gemv", [](Address tier, int dtype, Address x, int batch, std::int64_t cols,
                     const std::vector<std::tuple<Address, std::int64_t, bool, Address>>& matrices, int threads) {
        g::Matrix few[8];
        std::vector<g::Matrix> many;
        g::Matrix* list = few;
        if (matrices.size() > 8) {
            many.resize(matrices.size());
            list = many.data();
        }
        int count = 0;
        for (const auto& [weight, rows, packed, y] : matrices) {
            list[count++] = {at<const void>(weight), rows, packed, at<void>(y)};
        }
        g::gemv(*at<const g::Tier>(tier), dtype, at<const void>(x), batch, cols, list, count, threads);
    }, unlocked);
    m.def("bitmask_expand_tiles", [](Address tier, Address packed, Address weight, int threads) {
        g::expand(*at<const g::Tier>(tier), at<const Bytes>(packed), at<std::uint16_t>(weight), threads);
    }, unlocked);
    m.def("int8_gemv", [](Address tier, int dtype, Address x, int batch, Address packed, Address y, int threads) {
        g::int8_gemv(*at<const g::Tier>(tier), dtype, at<const void>(x), batch, at<const Bytes>(packed), at<void>(y),
                     threads);
    }, unlocked);
    m.def("active_gemv", [](Address tier, int dtype, Address x, int batch, std::int64_t channels, Address threshold, Address center,
                            const std::vector<std::tuple<Address, std::int64_t, bool, Address, Address>>& matrices,
                            int threads) {
        g::ActiveMatrix few[8];
        std::vector<g::ActiveMatrix> many;
        g::ActiveMatrix* list = few;
        if (matrices.size() > 8) {
            many.resize(matrices.size());
            list = many.data();
        }
        int count = 0;
        for (const auto& [weight, outputs, packed, bias, y] : matrices) {
            list[count++] = {at<const void>(weight), outputs, packed, at<const void>(bias), at<void>(y)};
        }
        return g::active_gemv(*at<const g::Tier>(tier), dtype, at<const void>(x), batch, channels,
                              at<const float>(threshold), at<const float>(center), list, count, threads);
    }, unlocked);
}

void define_dual(nb::module_& m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    namespace d = gossamer::dual;
    m.def("dual_size", [](std::int64_t rows, std::int64_t cols, std::int64_t nnz) {
        return d::Shape(rows, cols).size(nnz);
    });
    m.def("dual_fault", [](Address packed, std::int64_t size) { return d::find_fault(at<const Bytes>(packed), size); },
          unlocked);
    m.def("dual_pack", [](Address bits, Address values, std::int64_t nnz, std::int64_t rows, std::int64_t cols,
                          std::int64_t dtype, Address packed) {
        return d::pack(at<const Bytes>(bits), at<const std::uint16_t>(values), nnz, rows, cols, dtype,
                       at<Bytes>(packed));
    }, unlocked);
    m.def("dual_expand", [](Address tier, Address packed, Address weight_t, int threads) {
        gossamer::dual_expand(*at<const gossamer::Tier>(tier), at<const Bytes>(packed), at<std::uint16_t>(weight_t), threads);
    }, unlocked);
    m.def("dual_unpack", [](Address packed, Address bits, Address values) {
        d::unpack(at<const Bytes>(packed), at<Bytes>(bits), at<std::uint16_t>(values));
    }, unlocked);
}

void define_neuron(nb::module_& m) {
    namespace g = gossamer;
    m.def("neuron_mlp", [](Address tier, int dtype, Address x, int batch, Address gate, Address up, Address down_t,
                           std::int64_t neurons, std::int64_t hidden, int activation, Address active,
                           std::int64_t count, Address y, int threads) {
        const g::Mlp mlp{at<const void>(gate), at<const void>(up), at<const void>(down_t), neurons, hidden, activation};
        return g::neuron_mlp(*at<const g::Tier>(tier), dtype, at<const void>(x), batch, mlp,
                             at<const std::int32_t>(active), count, at<void>(y), threads);
    }, nb::call_guard<nb::gil_scoped_release>());
}

void define_window(nb::module_& m) {
    namespace g = gossamer;
    using New = std::tuple<Address, Address, Address>;  // key, value, slots
    using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
    m.def("window_attention", [](Address tier, int dtype, Address query, New added, Address keys, Address values,
                                 Address ranges, Sizes sizes, float scale, Address out, int threads) {
        const auto [key, value, slots] = added;
        const auto [batch, kv_heads, group, width, rows] = sizes;
        const g::Window window{at<const void>(query), at<const void>(key), at<const void>(value),
                               at<const std::int64_t>(slots), at<void>(keys), at<void>(values),
                               at<const std::int64_t>(ranges), batch, kv_heads, group, width, rows, scale,
                               at<void>(out)};
        return g::window_attention(*at<const g::Tier>(tier), dtype, window, threads);
    }, nb::call_guard<nb::gil_scoped_release>());
}

void define_csr(nb::module_& m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    namespace g = gossamer;
    m.def("csr_linear", [](Address tier, Address rowptr, Address columns, std::int64_t rows, std::int64_t cols,
                           std::int64_t count, Address values, Address x, std::int64_t tokens, Address y, int threads) {
        const g::CsrMatrix matrix{at<const std::int32_t>(rowptr), at<const std::int32_t>(columns), rows, cols, count};
        return g::csr_linear(*at<const g::Tier>(tier), matrix, at<const float>(values), at<const float>(x), tokens,
                             at<float>(y), threads);
    }, unlocked);
    m.def("csr_sampled", [](Address tier, Address rowptr, Address columns, std::int64_t rows, std::int64_t cols,
                            std::int64_t count, Address gy, Address x, std::int64_t tokens, Address room, Address out,
                            int threads) {
        const g::CsrMatrix matrix{at<const std::int32_t>(rowptr), at<const std::int32_t>(columns), rows, cols, count};
        return g::csr_sampled(*at<const g::Tier>(tier), matrix, at<const float>(gy), at<const float>(x), tokens,
                              at<float>(room), at<float>(out), threads);
    }, unlocked);
    m.def("csr_room", g::csr_room);
}

void define_entries(nb::module_& m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    namespace g = gossamer;
    m.def("channel_squares", [](Address tier, Address matrix, std::int64_t rows, std::int64_t cols, Address room,
                                Address row_sums, Address col_sums, int threads) {
        g::channel_squares(*at<const g::Tier>(tier), at<const float>(matrix), rows, cols, at<float>(room),
                           at<float>(row_sums), at<float>(col_sums), threads);
    }, unlocked);
    m.def("square_room", g::square_room);
    m.def("count_entries", [](Address tier, Address matrix, std::int64_t rows, std::int64_t cols, Address row_weights,
                              Address col_weights, float floor, Address starts, int threads) {
        const g::EntryCall call{at<const float>(matrix), rows, cols, at<const float>(row_weights),
                                at<const float>(col_weights), floor};
        return g::count_entries(*at<const g::Tier>(tier), call, at<std::int64_t>(starts), threads);
    }, unlocked);
    m.def("find_entries", [](Address tier, Address matrix, std::int64_t rows, std::int64_t cols, Address row_weights,
                             Address col_weights, float floor, Address starts, Address position, Address value,
                             int threads) {
        const g::EntryCall call{at<const float>(matrix), rows, cols, at<const float>(row_weights),
                                at<const float>(col_weights), floor};
        g::find_entries(*at<const g::Tier>(tier), call, at<const std::int64_t>(starts), at<std::int64_t>(position),
                        at<float>(value), threads);
    }, unlocked);
}

void define_norm(nb::module_& m) {
    m.def("rms_norm", [](int dtype, Address x, Address weight, std::int64_t rows, std::int64_t cols, float epsilon, Address y) {
        gossamer::rms_norm(dtype, at<const void>(x), at<const void>(weight), rows, cols, epsilon, at<void>(y));
    });  // a few microseconds: not worth giving the interpreter's lock away
}

// kind, threshold, center, and of each matrix weight, rows, packed, start, bias, output.
using MatrixWords = std::tuple<Address, std::int64_t, bool, Address, Address, int>;
using ProductWords = std::tuple<int, Address, Address, std::vector<MatrixWords>>;

std::vector<gossamer::Product> products(const std::vector<ProductWords>& words) {
    std::vector<gossamer::Product> made;
    for (const auto& [kind, threshold, center, matrices] : words) {
        gossamer::Product product{kind, at<const float>(threshold), at<const float>(center), {}};
        for (const auto& [weight, rows, packed, start, bias, output] : matrices) {
            product.matrices.push_back({at<const void>(weight), rows, packed, at<const void>(start),
                                        at<const void>(bias), output});
        }
        made.push_back(std::move(product));
    }
    return made;
}

using Turn = std::tuple<Address, Address, std::int64_t>;                      // cos, sin, rows
using Cached = std::tuple<Address, Address, std::int64_t, Address, Address>;  // keys, values, rows, slots, ranges

gossamer::Rotation turned(const Turn& turn) {
    const auto [cos, sin, rows] = turn;
    return {at<const void>(cos), at<const void>(sin), rows};
}

gossamer::Window held(const Cached& cached) {
    const auto [keys, values, rows, slots, ranges] = cached;
    gossamer::Window window{};
    window.keys = at<void>(keys), window.values = at<void>(values), window.rows = rows;
    window.slots = at<const std::int64_t>(slots), window.ranges = at<const std::int64_t>(ranges);
    return window;
}

void define_step(nb::module_& m) {
    namespace g = gossamer;
    m.def("watch_same", [](nb::tuple facts, nb::bytes numbers, nb::bytes lines) {
        return g::watch_same(facts.ptr(), numbers.ptr(), lines.ptr());
    });
    m.def("watch_view", [](nb::handle tensor) { return g::watch_view(tensor.ptr()); });
    using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
    nb::class_<g::AttentionHalf>(m, "AttentionHalf")
        .def("__init__", [](g::AttentionHalf* self, int dtype, Address norm, float epsilon, Sizes sizes, float scale,
                            const std::vector<ProductWords>& inputs, const std::vector<ProductWords>& output) {
            const auto [hidden, heads, kv_heads, width] = sizes;
            new (self) g::AttentionHalf{dtype,    {at<const void>(norm), epsilon}, hidden, heads, kv_heads, width, scale,
                                        products(inputs), products(output)};
        })
        .def("run", [](const g::AttentionHalf& self, Address tier, Address x, int batch, Turn turn, Cached cached,
                       Address y, int threads) {
            const g::Window window = held(cached);
            const g::Rotation rotation = turned(turn);
            return g::attend(*at<const g::Tier>(tier), self, at<const void>(x), batch, rotation, window, at<void>(y),
                             threads);
        }, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<g::FeedHalf>(m, "FeedHalf")
        .def("__init__", [](g::FeedHalf* self, int dtype, Address norm, float epsilon, std::int64_t hidden,
                            std::int64_t neurons, int activation, const std::vector<ProductWords>& inputs,
                            const std::vector<ProductWords>& output, std::tuple<Address, Address, Address> subset) {
            const auto [gate, up, down_t] = subset;
            new (self) g::FeedHalf{dtype,      {at<const void>(norm), epsilon}, hidden, neurons,
                                   activation, products(inputs), products(output), at<const void>(gate),
                                   at<const void>(up), at<const void>(down_t)};
        })
        .def("run", [](const g::FeedHalf& self, Address tier, Address x, int batch, Address active, std::int64_t count,
                       Address y, int threads) {
            return g::feed(*at<const g::Tier>(tier), self, at<const void>(x), batch, at<const std::int32_t>(active),
                           count, at<void>(y), threads);
        }, nb::call_guard<nb::gil_scoped_release>());
    m.def("whole", [](Address tier, const g::AttentionHalf& first, const g::FeedHalf& second, Address x, int batch,
                      Turn turn, Cached cached, Address active, std::int64_t count, Address y, int threads) {
        return g::whole(*at<const g::Tier>(tier), first, second, at<const void>(x), batch, turned(turn), held(cached),
                        at<const std::int32_t>(active), count, at<void>(y), threads);
    }, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

NB_MODULE(_C, m) {
    m.attr("__doc__") = "C++ kernels of Gossamer. Addresses in, nothing checked: call through the dispatch modules.";
    m.attr("interface") = kInterface;
    define_bitmask(m);
    define_tiles(m);
    define_gemv(m);
    define_dual(m);
    define_neuron(m);
    define_window(m);
    define_csr(m);
    define_entries(m);
    define_norm(m);
    define_step(m);
}
