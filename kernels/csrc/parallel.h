// Parallel regions on the OpenMP runtime that torch already uses.
#pragma once

#include <cstdint>

namespace gossamer {

// Calls body(data, 0) to body(data, parts - 1), on up to `parts` threads, and returns when all are done.
void run_parts(int parts, void (*body)(void*, int), void* data);

// Where the threads come from: "openmp of torch", or "none" (everything runs in the calling thread).
const char* parallel_runtime();

}  // namespace gossamer
