// Whether modules and their tensors are still as they were when kernels/modules/watch.py wrote them down.
#pragma once

#include <Python.h>

namespace gossamer {

// `facts`: a tuple in the order of watch.py, `numbers`: bytes of int64 in the same order. Both are read front to back:
// between two tokens weights have run through the caches, and what is scattered in memory costs a miss each.
// `lines`: bytes of addresses that will be read, asked for all at once. False too where something cannot be read any
// more; no Python error is left behind.
bool watch_same(PyObject* facts, PyObject* numbers, PyObject* lines);

}  // namespace gossamer
