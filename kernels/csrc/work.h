// What every call does around its tier's loops: memory of its own, x prepared, work dealt out to threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "gemv.h"
#include "parallel.h"

namespace gossamer {
namespace {

// Waking a second thread costs microseconds, so less than this many bytes of weight per thread is not worth it.
constexpr std::int64_t kBytesPerThread = 128 * 1024;
constexpr std::int64_t kLine = 64;

// Memory of the calling thread that only grows, on a cache line.
template <int kSlot>
std::uint8_t* scratch(std::int64_t bytes) {
    thread_local std::unique_ptr<std::uint8_t[]> memory;
    thread_local std::int64_t capacity = 0;
    if (bytes + kLine > capacity) {
        memory.reset(new std::uint8_t[static_cast<std::size_t>(bytes + kLine)]);
        capacity = bytes + kLine;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
    return memory.get() + (kLine - address % kLine) % kLine;
}

inline std::int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline int parts_for(std::int64_t bytes, int threads) {
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, bytes / kBytesPerThread)));
}

template <class Body>
void in_parts(int parts, Body body) {
    run_parts(parts, [](void* data, int part) { (*static_cast<Body*>(data))(part); }, &body);
}

// x [batch, cols] as prepared rows, zero rows up to the padded batch.
struct Prepared {
    std::uint8_t* rows = nullptr;
    std::int64_t stride = 0;
};

template <int kSlot>
Prepared prepare(std::int64_t (*row_bytes)(int, std::int64_t),
                 void (*prepare_row)(int, const void*, std::int64_t, std::uint8_t*), int dtype, const void* x,
                 int batch, std::int64_t cols) {
    Prepared made;
    made.stride = (row_bytes(dtype, cols) + kLine - 1) / kLine * kLine;
    made.rows = scratch<kSlot>(made.stride * padded_batch(batch));
    for (int b = 0; b < batch; ++b) {
        const auto* row = static_cast<const std::uint8_t*>(x) + b * cols * element_size(dtype);
        prepare_row(dtype, row, cols, made.rows + b * made.stride);
    }
    const auto rest = static_cast<std::size_t>((padded_batch(batch) - batch) * made.stride);
    std::memset(made.rows + batch * made.stride, 0, rest);
    return made;
}

// Channels that x needs, in memory of the calling thread (slots kSlot and kSlot + 1).
struct Active {
    std::int32_t* channels;
    float* x;  // [count, padded batch]
    std::int64_t count;
};

template <int kSlot>
Active compact(const Tier& tier, int dtype, const void* x, int batch, std::int64_t channels, const float* threshold) {
    constexpr std::int64_t kVector = 64;  // bytes that a tier may write beyond the last channel
    Active made;
    made.channels = reinterpret_cast<std::int32_t*>(scratch<kSlot>(4 * channels + kVector));
    made.x = reinterpret_cast<float*>(scratch<kSlot + 1>(4 * channels * padded_batch(batch) + kVector));
    made.count = tier.compact(dtype, x, batch, channels, threshold, made.channels, made.x);
    return made;
}

}  // namespace
}  // namespace gossamer
