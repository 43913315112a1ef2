// Bindings. Tensors come as addresses: handing over a tensor object costs microseconds per argument, and Python has
// checked device, dtype, size and contiguity before and keeps the tensors alive during the call.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "bitmask.h"

namespace nb = nanobind;

namespace {

// Raised whenever a signature changes, so that a stale build is noticed (kernels/extension.py).
constexpr int kInterface = 1;

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

}  // namespace

NB_MODULE(_C, m) {
    m.attr("__doc__") = "C++ kernels of Gossamer. Addresses in, nothing checked: call through the dispatch modules.";
    m.attr("interface") = kInterface;
    define_bitmask(m);
}
