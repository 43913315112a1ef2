// One token of a few sequences through the halves of a decoder block of the Llama kind, in one call each.
#pragma once

#include <cstdint>
#include <vector>

#include "window.h"

namespace gossamer {

// One matrix of a product. `output`: which of the results of its half it makes.
struct ProductMatrix {
    const void* weight;  // dense [rows, cols], its transpose (kActive), or a packed tensor
    std::int64_t rows;
    bool packed;
    const void* start;  // kActive: [rows] where sums begin, or nullptr
    const void* bias;   // [rows], added after rounding, or nullptr
    int output;
};

// Matrices that are multiplied with the same x in one call.
struct Product {
    enum Kind : int { kPlain = 0, kInt8 = 1, kActive = 2 };
    int kind;
    const float* threshold;  // kActive: [cols]
    const float* center;     // kActive: [cols] or nullptr
    std::vector<ProductMatrix> matrices;
};

struct Norm {
    const void* weight;
    float epsilon;
};

// x + o(attention(rotated q(n), rotated k(n), v(n))), n = norm(x). Everything between is rounded to the dtype, where the
// block's own code rounds.
struct AttentionHalf {
    int dtype;
    Norm norm;
    std::int64_t hidden, heads, kv_heads, width;
    float scale;
    std::vector<Product> inputs;  // outputs 0, 1, 2: query, key, value
    std::vector<Product> output;
};

// x + down(act(gate(n)) up(n)), n = norm(x); or on a subset of neurons, with `subset` instead of the products.
struct FeedHalf {
    int dtype;
    Norm norm;
    std::int64_t hidden, neurons;
    int activation;
    std::vector<Product> inputs;  // outputs 0, 1: gate, up
    std::vector<Product> output;
    const void *gate, *up, *down_t;  // [neurons, hidden]; nullptr without
};

// Cosines and sines of the token's position, [rows, width] in the dtype: one row for all sequences, or one each.
struct Rotation {
    const void *cos, *sin;
    std::int64_t rows;
};

// y [batch, hidden]. Keys and values are stored and read as in window.h; `cached.query`, `key`, `value` and `out` are not
// looked at. False, and nothing done, unless slots and ranges lie within the rows.
bool attend(const Tier& tier, const AttentionHalf& half, const void* x, int batch, const Rotation& rotation,
            const Window& cached, void* y, int threads);

// y [batch, hidden]. With `active` [count], the same neurons for all rows: False, and nothing done, unless they rise.
bool feed(const Tier& tier, const FeedHalf& half, const void* x, int batch, const std::int32_t* active,
          std::int64_t count, void* y, int threads);

// One after the other: feed(attend(x)). False where one of them is; keys and values may be stored then.
bool whole(const Tier& tier, const AttentionHalf& first, const FeedHalf& second, const void* x, int batch,
           const Rotation& rotation, const Window& cached, const std::int32_t* active, std::int64_t count, void* y,
           int threads);

}  // namespace gossamer
