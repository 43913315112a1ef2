// Whether modules and their tensors are still as they were when kernels/modules/watch.py wrote them down.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace gossamer {

// `facts`: a tuple in the order of watch.py, `numbers`: bytes of int64 in the same order. Both are read front to back:
// between two tokens weights have run through the caches, and what is scattered in memory costs a miss each.
// `lines`: bytes of addresses that will be read, asked for all at once. False too where something cannot be read any
// more; no Python error is left behind.
bool watch_same(PyObject* facts, PyObject* numbers, PyObject* lines);

// What `numbers` hold of a tensor that torch can show without making Python objects: address, dtype, device, shape and
// strides, behind the address of torch's table of functions that does it. Empty where it cannot.
std::vector<std::int64_t> watch_view(PyObject* tensor);

}  // namespace gossamer
