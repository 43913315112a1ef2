// From formats to a table of functions. Included once by every tier_*.cpp, behind its formats, which are the types
// Dense<W>, Mask<W>, Dual<W>, Channel<W> and Words<W> of an unnamed namespace with W in {float, Bf16, Fp16}, and Int8.
#pragma once

#include "float16.h"
#include "rows_bitmask.h"
#include "rows_channel.h"
#include "rows_csr.h"
#include "rows_dense.h"
#include "rows_dual.h"
#include "rows_entries.h"
#include "rows_gate.h"
#include "rows_int8.h"
#include "rows_neuron.h"
#include "rows_window.h"

namespace gossamer {
namespace {

template <class T>
struct Type {
    using W = T;
};

template <class Run>
auto by_dtype(int dtype, Run run) {
    switch (dtype) {
        case kBfloat16: return run(Type<Bf16>{});
        case kFloat16: return run(Type<Fp16>{});
        default: return run(Type<float>{});
    }
}

// Bitmask matrices hold 16-bit values only.
template <class Run>
auto by_dtype16(int dtype, Run run) {
    return dtype == kBfloat16 ? run(Type<Bf16>{}) : run(Type<Fp16>{});
}

std::int64_t dense_row_(int dtype, std::int64_t cols) {
    return by_dtype(dtype, [&](auto t) { return dense_row_bytes<Dense<typename decltype(t)::W>>(cols); });
}

std::int64_t bitmask_row_(int dtype, std::int64_t cols) {
    return by_dtype16(dtype, [&](auto t) { return bitmask_row_bytes<Mask<typename decltype(t)::W>>(cols); });
}

void dense_prepare_(int dtype, const void* x, std::int64_t cols, std::uint8_t* row) {
    by_dtype(dtype, [&](auto t) { dense_prepare_row<Dense<typename decltype(t)::W>>(x, cols, row); });
}

void bitmask_prepare_(int dtype, const void* x, std::int64_t cols, std::uint8_t* row) {
    by_dtype16(dtype, [&](auto t) { bitmask_prepare_row<Mask<typename decltype(t)::W>>(x, cols, row); });
}

void dense_run_(int dtype, const DenseCall& call, std::int64_t begin, std::int64_t end) {
    by_dtype(dtype, [&](auto t) { dense_rows<Dense<typename decltype(t)::W>>(call, begin, end); });
}

void bitmask_run_(int dtype, const BitmaskCall& call, std::int64_t begin, std::int64_t end) {
    by_dtype16(dtype, [&](auto t) { bitmask_tiles<Mask<typename decltype(t)::W>>(call, begin, end); });
}

std::int64_t int8_bytes_(int batch, std::int64_t cols) { return Int8Room(cols, batch, sizeof(Int8::X)).bytes(); }

void int8_prepare_(int dtype, const void* x, std::uint8_t* prepared, Int8Call* call) {
    by_dtype(dtype, [&](auto t) {
        int8_prepare<Int8>(static_cast<const typename decltype(t)::W*>(x), prepared, call);
    });
}

void int8_run_(const Int8Call& call, std::int64_t begin, std::int64_t end) { int8_tiles<Int8>(call, begin, end); }

void channel_run_(int dtype, const ChannelCall& call, std::int64_t begin, std::int64_t end) {
    by_dtype(dtype, [&](auto t) { channel_outputs<Channel<typename decltype(t)::W>>(call, begin, end); });
}

void narrow_(int dtype, const float* sums, std::int64_t count, void* y) {
    by_dtype(dtype, [&](auto t) {
        auto* to = static_cast<typename decltype(t)::W*>(y);
        for (std::int64_t i = 0; i < count; ++i) narrow(sums[i], to + i);
    });
}

std::int64_t compact_(int dtype, const void* x, int batch, std::int64_t channels, const float* threshold,
                      std::int32_t* active, float* values) {
    return by_dtype(dtype, [&](auto t) {
        using W = typename decltype(t)::W;
        return channel_compact<Channel<W>>(static_cast<const W*>(x), batch, channels, threshold, active, values);
    });
}

#if !defined(__AVX512VBMI2__)
// Without branches on single bits, which nobody can predict.
const std::uint16_t* expand_row(const std::uint8_t* mask, const std::uint16_t* values, std::uint16_t* out) {
    for (int byte = 0; byte < tiles::kCols / 8; ++byte, out += 8) {
        const unsigned bits = mask[byte];
        for (int i = 0; i < 8; ++i) {
            const unsigned kept = bits >> i & 1u;
            out[i] = kept != 0 ? *values : std::uint16_t{0};
            values += kept;
        }
    }
    return values;
}
#endif

const std::uint16_t* expand_row_(const std::uint8_t* mask, const std::uint16_t* values, std::uint16_t* out) {
#if defined(__AVX512VBMI2__)
    return expand_row(mask, values, [&](int i, __m512i v) { _mm512_storeu_si512(out + 32 * i, v); });
#else
    return expand_row(mask, values, out);
#endif
}

void subtract_(int dtype, const void* x, const float* center, int rows, std::int64_t count, void* y) {
    by_dtype(dtype, [&](auto t) {
        using W = typename decltype(t)::W;
        for (int r = 0; r < rows; ++r) {
            const W* from = static_cast<const W*>(x) + r * count;
            W* to = static_cast<W*>(y) + r * count;
            for (std::int64_t i = 0; i < count; ++i) narrow(widen(from[i]) - center[i], to + i);
        }
    });
}

void dual_run_(int dtype, const DualCall& call, std::int64_t begin, std::int64_t end) {
    by_dtype16(dtype, [&](auto t) { dual_outputs<Dual<typename decltype(t)::W>>(call, begin, end); });
}

void channel_finish_(int dtype, const FinishCall& call) {
    by_dtype(dtype, [&](auto t) { channel_finish<Channel<typename decltype(t)::W>>(call); });
}

void dual_finish_(int dtype, const FinishCall& call) {
    by_dtype16(dtype, [&](auto t) { dual_finish<Dual<typename decltype(t)::W>>(call); });
}

void neuron_run_(int dtype, const NeuronCall& call, std::int64_t begin, std::int64_t end) {
    by_dtype(dtype, [&](auto t) { neuron_rows<Dense<typename decltype(t)::W>>(call, begin, end); });
}

void gate_(int dtype, int activation, void* gates, const void* ups, std::int64_t count) {
    by_dtype(dtype, [&](auto t) {
        using W = typename decltype(t)::W;
        gate_rows<W>(activation, static_cast<W*>(gates), static_cast<const W*>(ups), count);
    });
}

template <class W>
using Windowed = WindowOf<Channel<W>, Words<W>>;

WindowSizes window_sizes_(int dtype, int group, std::int64_t width) {
    return by_dtype(dtype, [&](auto t) { return Windowed<typename decltype(t)::W>::sizes(group, width); });
}

void window_prepare_(int dtype, const void* query, std::int64_t width, float* prepared) {
    by_dtype(dtype, [&](auto t) {
        using W = typename decltype(t)::W;
        Windowed<W>::prepare(static_cast<const W*>(query), width, prepared);
    });
}

void window_run_(int dtype, const WindowPart& part) {
    by_dtype(dtype, [&](auto t) { Windowed<typename decltype(t)::W>::run(part); });
}

void window_finish_(int dtype, const float* sums, float total, std::int64_t width, void* y) {
    by_dtype(dtype, [&](auto t) {
        using W = typename decltype(t)::W;
        Windowed<W>::finish(sums, total, width, static_cast<W*>(y));
    });
}

using Unit = Channel<float>::S;

constexpr Tier make_tier(const char* name) {
    return Tier{name,         dense_row_, bitmask_row_, dense_prepare_, bitmask_prepare_, dense_run_,   bitmask_run_,
                int8_bytes_,  int8_prepare_, int8_run_,  channel_run_,   narrow_,          expand_row_, compact_,
                subtract_,    dual_run_,     channel_finish_, dual_finish_,  neuron_run_,   gate_,
                window_sizes_, window_prepare_, window_run_, window_finish_,
                turn_group<Unit>, csr_rows<Unit>, csr_dots<Unit>, square_sums<Unit>,
                beyond<Unit>};
}

}  // namespace
}  // namespace gossamer
