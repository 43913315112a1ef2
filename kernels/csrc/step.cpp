#include "step.h"

#include "active.h"
#include "float16.h"
#include "neuron.h"
#include "norm.h"
#include "work.h"

namespace gossamer {
namespace {

constexpr int kOutputs = 3;

using Bytes = std::uint8_t;

// Memory of the calling thread for `count` numbers; a slot of its own for each thing that lives during a call.
template <int kSlot>
Bytes* room(int dtype, std::int64_t count) {
    return scratch<kSlot>(count * element_size(dtype));
}

// body(W{}) with the dtype as a type.
template <class Body>
void typed(int dtype, Body body) {
    if (dtype == kFloat32) return body(float{});
    if (dtype == kBfloat16) return body(Bf16{});
    body(Fp16{});
}

// y [rows, cols] += x, rounded: a row of its own for every row of y, or one for all (`repeat`).
void add(int dtype, const void* x, std::int64_t rows, std::int64_t cols, bool repeat, void* y) {
    typed(dtype, [&](auto kind) {
        using W = decltype(kind);
        for (std::int64_t r = 0; r < rows; ++r) {
            const W* from = static_cast<const W*>(x) + (repeat ? 0 : r * cols);
            W* to = static_cast<W*>(y) + r * cols;
            for (std::int64_t i = 0; i < cols; ++i) narrow(widen(to[i]) + widen(from[i]), &to[i]);
        }
    });
}

void multiply(const Tier& tier, int dtype, const std::vector<Product>& products, const void* x, int batch,
              std::int64_t cols, Bytes* const* outputs, int threads) {
    for (const Product& product : products) {
        const int count = static_cast<int>(product.matrices.size());
        if (product.kind == Product::kActive) {
            ActiveMatrix list[kOutputs];
            for (int i = 0; i < count; ++i) {
                const ProductMatrix& one = product.matrices[static_cast<std::size_t>(i)];
                list[i] = {one.weight, one.rows, one.packed, one.start, outputs[one.output]};
            }
            active_gemv(tier, dtype, x, batch, cols, product.threshold, product.center, list, count, threads);
        } else if (product.kind == Product::kInt8) {
            for (const ProductMatrix& one : product.matrices) {
                int8_gemv(tier, dtype, x, batch, static_cast<const Bytes*>(one.weight), outputs[one.output], threads);
            }
        } else {
            Matrix list[kOutputs];
            for (int i = 0; i < count; ++i) {
                const ProductMatrix& one = product.matrices[static_cast<std::size_t>(i)];
                list[i] = {one.weight, one.rows, one.packed, outputs[one.output]};
            }
            gemv(tier, dtype, x, batch, cols, list, count, threads);
        }
        for (const ProductMatrix& one : product.matrices) {
            if (one.bias != nullptr) add(dtype, one.bias, batch, one.rows, true, outputs[one.output]);
        }
    }
}

// Every head of x [batch, heads, width] in place: x cos + rotate_half(x) sin, each product rounded, then the sum.
template <class W>
void rotate(W* x, std::int64_t batch, std::int64_t heads, std::int64_t width, const Rotation& by) {
    const std::int64_t half = width / 2;
    for (std::int64_t b = 0; b < batch; ++b) {
        const std::int64_t row = by.rows == 1 ? 0 : b;
        const W* cos = static_cast<const W*>(by.cos) + row * width;
        const W* sin = static_cast<const W*>(by.sin) + row * width;
        for (std::int64_t h = 0; h < heads; ++h, x += width) {
            for (std::int64_t i = 0; i < half; ++i) {
                const float first = widen(x[i]), second = widen(x[i + half]);
                W a, b1, c, d;
                narrow(first * widen(cos[i]), &a);
                narrow(-second * widen(sin[i]), &b1);
                narrow(second * widen(cos[i + half]), &c);
                narrow(first * widen(sin[i + half]), &d);
                narrow(widen(a) + widen(b1), &x[i]);
                narrow(widen(c) + widen(d), &x[i + half]);
            }
        }
    }
}

}  // namespace

bool attend(const Tier& tier, const AttentionHalf& half, const void* x, int batch, const Rotation& rotation,
            const Window& cached, void* y, int threads) {
    const int dtype = half.dtype;
    const std::int64_t wide = half.heads * half.width, narrow_width = half.kv_heads * half.width;
    Bytes* normed = room<0>(dtype, batch * half.hidden);
    rms_norm(dtype, x, half.norm.weight, batch, half.hidden, half.norm.epsilon, normed);
    Bytes* const made[kOutputs] = {room<1>(dtype, batch * wide), room<2>(dtype, batch * narrow_width),
                                   room<3>(dtype, batch * narrow_width)};
    multiply(tier, dtype, half.inputs, normed, batch, half.hidden, made, threads);
    typed(dtype, [&](auto kind) {
        using W = decltype(kind);
        rotate(reinterpret_cast<W*>(made[0]), batch, half.heads, half.width, rotation);
        rotate(reinterpret_cast<W*>(made[1]), batch, half.kv_heads, half.width, rotation);
    });
    Window window = cached;
    window.query = made[0], window.key = made[1], window.value = made[2];
    window.batch = batch, window.kv_heads = half.kv_heads, window.group = half.heads / half.kv_heads;
    window.width = half.width, window.scale = half.scale;
    window.out = room<4>(dtype, batch * wide);
    if (!window_attention(tier, dtype, window, threads)) return false;
    Bytes* const out[kOutputs] = {static_cast<Bytes*>(y), nullptr, nullptr};
    multiply(tier, dtype, half.output, window.out, batch, wide, out, threads);
    add(dtype, x, batch, half.hidden, false, y);
    return true;
}

bool feed(const Tier& tier, const FeedHalf& half, const void* x, int batch, const std::int32_t* active,
          std::int64_t count, void* y, int threads) {
    const int dtype = half.dtype;
    Bytes* normed = room<0>(dtype, batch * half.hidden);
    rms_norm(dtype, x, half.norm.weight, batch, half.hidden, half.norm.epsilon, normed);
    if (active != nullptr) {
        const Mlp mlp{half.gate, half.up, half.down_t, half.neurons, half.hidden, half.activation};
        if (!neuron_mlp(tier, dtype, normed, batch, mlp, active, count, y, threads)) return false;
    } else {
        Bytes* const made[kOutputs] = {room<1>(dtype, batch * half.neurons), room<2>(dtype, batch * half.neurons),
                                       nullptr};
        multiply(tier, dtype, half.inputs, normed, batch, half.hidden, made, threads);
        tier.gate(dtype, half.activation, made[0], made[1], batch * half.neurons);
        Bytes* const out[kOutputs] = {static_cast<Bytes*>(y), nullptr, nullptr};
        multiply(tier, dtype, half.output, made[0], batch, half.neurons, out, threads);
    }
    add(dtype, x, batch, half.hidden, false, y);
    return true;
}

bool whole(const Tier& tier, const AttentionHalf& first, const FeedHalf& second, const void* x, int batch,
           const Rotation& rotation, const Window& cached, const std::int32_t* active, std::int64_t count, void* y,
           int threads) {
    Bytes* between = room<5>(first.dtype, batch * first.hidden);
    return attend(tier, first, x, batch, rotation, cached, between, threads) &&
           feed(tier, second, between, batch, active, count, y, threads);
}

}  // namespace gossamer
