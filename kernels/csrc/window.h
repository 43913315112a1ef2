// Attention of one query per sequence over ranges of rows of a ragged cache.
#pragma once

#include <cstdint>

#include "gemv.h"

namespace gossamer {

constexpr int kWindowChunk = 512;  // keys whose scores are held at a time

// Up to kWindowChunk rows that one group of query heads sees, as at most two runs: what a tier computes.
struct WindowPart {
    const void* keys[2];    // [count, width]
    const void* values[2];  // [count, width]
    std::int64_t count[2];
    std::int64_t width;
    int group;
    float scale;
    const float* query;  // prepared, [group, padded words]
    std::uint8_t* room;  // WindowRoom bytes
    float* best;         // [group] the greatest score
    float* total;        // [group] sum of exp(score - best)
    float* sums;         // [group, padded width] of exp(score - best) times values
};

// Sizes that depend on the tier, in floats.
struct WindowSizes {
    std::int64_t query;  // of one prepared query
    std::int64_t sums;   // of one row of sums
    std::int64_t room;   // of a thread's own memory
};

struct Window {
    const void* query;  // [batch, kv heads, group, width]
    const void* key;    // [batch, kv heads, width] to be stored first, or null
    const void* value;
    const std::int64_t* slots;  // [batch, kv heads]
    void* keys;                 // [rows, width]
    void* values;
    const std::int64_t* ranges;  // [batch, kv heads, 4]
    std::int64_t batch, kv_heads, group, width, rows;
    float scale;
    void* out;  // [batch, kv heads, group, width]
};

// False, and nothing done, unless slots and ranges lie within the rows.
bool window_attention(const Tier& tier, int dtype, const Window& window, int threads);

}  // namespace gossamer
