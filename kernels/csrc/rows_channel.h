// Sums of active rows of W^T [channels, outputs], written once for all tiers.
//
// A format C gives: S (the vector unit), W, kStep = 2 lanes, widen(w, a, b): kStep weights as two vectors of floats in
// an order of its own, narrow(a, b, out), which undoes that order, and row(w): one vector of floats in order.
// The unit S also has exceed(x, t): bit i set unless |x_i| <= t_i, and append(bits, vector, out), which writes the lanes
// whose bit is set one after the other (and may write up to a vector more).
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "float16.h"
#include "gemv.h"

namespace gossamer {

// Lanes [0, count) of x and thresholds, of `count` up to the vector's length; the others are never active.
template <class C>
inline unsigned channel_exceed(const typename C::W* x, const float* threshold, std::int64_t count, typename C::S::F* out) {
    using S = typename C::S;
    if (count >= S::kLanes) {
        *out = C::row(x);
        return S::exceed(*out, S::load(threshold));
    }
    typename C::W part[S::kLanes] = {};
    float limits[S::kLanes] = {};
    for (std::int64_t i = 0; i < count; ++i) part[i] = x[i], limits[i] = threshold[i];
    *out = C::row(part);
    return S::exceed(*out, S::load(limits));
}

// Channels that any row of x [batch, channels] needs, and their inputs [count][padded batch], 0 where a row does not.
// Both outputs have room for one more vector.
template <class C>
std::int64_t channel_compact(const typename C::W* x, int batch, std::int64_t channels, const float* threshold,
                             std::int32_t* active, float* values) {
    using S = typename C::S;
    using F = typename S::F;
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < channels; i += S::kLanes) {
        F row;
        unsigned bits = channel_exceed<C>(x + i, threshold + i, channels - i, &row);
        if (batch == 1) S::append(bits, row, values + count);
        for (int b = 1; b < batch; ++b) {
            bits |= channel_exceed<C>(x + b * channels + i, threshold + i, channels - i, &row);
        }
        count += S::append(bits, static_cast<std::int32_t>(i), active + count);
    }
    if (batch == 1) return count;
    const int padded = padded_batch(batch);
    for (std::int64_t n = 0; n < count; ++n) {
        const std::int64_t i = active[n];
        for (int b = 0; b < padded; ++b) {
            const float value = b < batch ? widen(x[b * channels + i]) : 0.0f;
            values[n * padded + b] = (value < 0 ? -value : value) <= threshold[i] ? 0.0f : value;
        }
        for (int b = batch; b < padded; ++b) values[n * padded + b] = 0.0f;
    }
    return count;
}

// Channels read side by side. Rows of W^T are often a power of two apart, so their lines compete for the 8 to 12 places of
// one cache set: 16 were at times faster, at times slower, 24 took twice as long. On Zen 3, 8 take 0.85 to 0.9 of the time
// of 12.
template <class S>
constexpr int kGroup = S::kLanes == 16 ? 12 : 8;
// Each line that is used asks for the line at the same place of the next group's row, into the second-level cache: requests
// come as evenly as they are used, and the processor's prefetchers, which take two or three misses to see a stream, have
// nothing left to find. Asking for whole rows at once was slower than not asking; for their first two lines only, 1.05
// times as slow in rows of 11 KiB and 1.13 times in rows of 4 KiB.
constexpr std::int64_t kBlockFloats = 4096;   // sums of a block of outputs, all rows of x: half of a first-level cache

// Channels to add: rows[i] points at their weights of the first output, x [kCount][B] at their inputs.
template <class W>
struct Group {
    const W* const* rows;
    const float* x;
    const W* const* next;  // [kCount] rows to ask for, or nullptr
};

// Adds kCount channels to the sums [B][outputs] of kWide steps of outputs from o on.
template <class C, int B, int kCount, int kWide, bool kAsk>
inline void channel_step(const Group<typename C::W>& group, std::int64_t outputs, std::int64_t o, float* sums) {
    using S = typename C::S;
    using F = typename S::F;
    constexpr int kHold = B == 1 ? 1 : kCount < 4 ? kCount : 4;  // widened rows in registers while the rows of x go by
    constexpr int kBytes = C::kStep * static_cast<int>(sizeof(typename C::W)), kLines = kBytes > 64 ? kBytes / 64 : 1;
    F sum[B == 1 ? 2 * kWide : 1];
    if constexpr (B == 1) {
        for (int n = 0; n < 2 * kWide; ++n) sum[n] = S::load(sums + o + n * S::kLanes);
        for (int i = 0; i < kCount; ++i) {
            const F value = S::set1(group.x[i]);
            for (int n = 0; n < kWide; ++n) {
                F u, v;
                if constexpr (kAsk) ask_for(group.next[i] + o + n * C::kStep, kLines);
                C::widen(group.rows[i] + o + n * C::kStep, u, v);
                sum[2 * n] = S::fma(value, u, sum[2 * n]);
                sum[2 * n + 1] = S::fma(value, v, sum[2 * n + 1]);
            }
        }
        for (int n = 0; n < 2 * kWide; ++n) S::store(sums + o + n * S::kLanes, sum[n]);
    } else {
        for (int n = 0; n < kWide; ++n) {
            for (int first = 0; first < kCount; first += kHold) {
                F u[kHold], v[kHold];
                for (int i = 0; i < kHold; ++i) {
                    if constexpr (kAsk) ask_for(group.next[first + i] + o + n * C::kStep, kLines);
                    C::widen(group.rows[first + i] + o + n * C::kStep, u[i], v[i]);
                }
                for (int r = 0; r < B; ++r) {
                    float* at = sums + r * outputs + o + n * C::kStep;
                    F a = S::load(at), b = S::load(at + S::kLanes);
                    for (int i = 0; i < kHold; ++i) {
                        const F value = S::set1(group.x[(first + i) * B + r]);
                        a = S::fma(value, u[i], a);
                        b = S::fma(value, v[i], b);
                    }
                    S::store(at, a);
                    S::store(at + S::kLanes, b);
                }
            }
        }
    }
}

// A group over all outputs of a block.
template <class C, int B, int kCount, bool kAsk = false>
inline void channel_group(const Group<typename C::W>& group, std::int64_t outputs, float* sums) {
    constexpr int kWide = 2;
    std::int64_t o = 0;
    for (; o + kWide * C::kStep <= outputs; o += kWide * C::kStep) {
        channel_step<C, B, kCount, kWide, kAsk>(group, outputs, o, sums);
    }
    for (; o < outputs; o += C::kStep) channel_step<C, B, kCount, 1, kAsk>(group, outputs, o, sums);
}

// Sums [B][outputs] as they begin: the bias, in the order that widen gives, or zero.
template <class C, int B>
inline void channel_begin(const typename C::W* bias, std::int64_t outputs, float* sums) {
    using S = typename C::S;
    for (std::int64_t o = 0; o < outputs; o += C::kStep) {
        typename S::F a = S::zero(), b = S::zero();
        if (bias != nullptr) C::widen(bias + o, a, b);
        for (int r = 0; r < B; ++r) S::store(sums + r * outputs + o, a), S::store(sums + r * outputs + o + S::kLanes, b);
    }
}

// Outputs [begin, end), end - begin a multiple of kStep and at most a block.
template <class C, int B>
void channel_block(const ChannelCall& call, std::int64_t begin, std::int64_t end) {
    using W = typename C::W;
    using S = typename C::S;
    constexpr int kSide = kGroup<S>;
    const W* weight = static_cast<const W*>(call.weight) + begin;
    const std::int64_t outputs = end - begin;
    alignas(64) float sums[kBlockFloats];
    channel_begin<C, B>(call.bias == nullptr ? nullptr : static_cast<const W*>(call.bias) + begin, outputs, sums);
    std::int64_t i = 0;
    for (; i + kSide <= call.count; i += kSide) {
        const W *rows[kSide], *next[kSide];
        for (int n = 0; n < kSide; ++n) {
            rows[n] = weight + call.active[i + n] * call.outputs;
            next[n] = weight + call.active[std::min(i + kSide + n, call.count - 1)] * call.outputs;
        }
        if (i + kSide < call.count) {
            channel_group<C, B, kSide, true>({rows, call.x + i * B, next}, outputs, sums);
        } else {
            channel_group<C, B, kSide>({rows, call.x + i * B, nullptr}, outputs, sums);
        }
    }
    const auto rest = [&](auto size) {
        constexpr int kCount = decltype(size)::value;
        for (; i + kCount <= call.count; i += kCount) {
            const W* rows[kCount];
            for (int n = 0; n < kCount; ++n) rows[n] = weight + call.active[i + n] * call.outputs;
            channel_group<C, B, kCount>({rows, call.x + i * B, nullptr}, outputs, sums);
        }
    };
    rest(std::integral_constant<int, 4>{});
    rest(std::integral_constant<int, 1>{});
    if (call.sums != nullptr) {
        for (int r = 0; r < call.batch; ++r) {
            float* to = call.sums + r * sums_stride(call.outputs) + begin;
            std::memcpy(to, sums + r * outputs, static_cast<std::size_t>(outputs) * sizeof *to);
        }
        return;
    }
    for (int r = 0; r < call.batch; ++r) {
        W* y = static_cast<W*>(call.y) + r * call.outputs + begin;
        for (std::int64_t o = 0; o < outputs; o += C::kStep) {
            const float* sum = sums + r * outputs + o;
            C::narrow(S::load(sum), S::load(sum + S::kLanes), y + o);
        }
    }
}

// The last outputs, fewer than kStep: each row's end is copied to a whole step.
template <class C, int B>
void channel_rest(const ChannelCall& call, std::int64_t begin, std::int64_t end) {
    using W = typename C::W;
    using S = typename C::S;
    const W* weight = static_cast<const W*>(call.weight) + begin;
    alignas(64) float sums[B * C::kStep];
    W part[C::kStep] = {};
    const W* row = part;
    const auto copy = [&](const W* from) {
        for (std::int64_t o = 0; o < end - begin; ++o) part[o] = from[o];
    };
    if (call.bias != nullptr) copy(static_cast<const W*>(call.bias) + begin);
    channel_begin<C, B>(call.bias == nullptr ? nullptr : part, C::kStep, sums);
    for (std::int64_t i = 0; i < call.count; ++i) {
        copy(weight + call.active[i] * call.outputs);
        channel_group<C, B, 1>({&row, call.x + i * B, nullptr}, C::kStep, sums);
    }
    for (int r = 0; r < call.batch; ++r) {
        const float* sum = sums + r * C::kStep;
        if (call.sums != nullptr) {
            std::memcpy(call.sums + r * sums_stride(call.outputs) + begin, sum, C::kStep * sizeof *sum);
            continue;
        }
        C::narrow(S::load(sum), S::load(sum + S::kLanes), part);
        for (std::int64_t o = begin; o < end; ++o) {
            static_cast<W*>(call.y)[r * call.outputs + o] = part[o - begin];
        }
    }
}

template <class C, int B>
void channel_outputs_of(const ChannelCall& call, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kMost = kBlockFloats / B;
    const std::int64_t whole = begin + (end - begin) / C::kStep * C::kStep;
    // Blocks of about one length: a short one at the end would be read in short pieces.
    const std::int64_t blocks = (whole - begin + kMost - 1) / kMost;
    const std::int64_t size = blocks == 0 ? 0 : ((whole - begin) / C::kStep + blocks - 1) / blocks * C::kStep;
    for (std::int64_t o = begin; o < whole; o += size) {
        channel_block<C, B>(call, o, std::min(o + size, whole));
    }
    if (whole < end) channel_rest<C, B>(call, whole, end);
}

// y of the sums of several parts.
template <class C>
void channel_finish(const FinishCall& call) {
    using W = typename C::W;
    using S = typename C::S;
    const std::int64_t stride = sums_stride(call.outputs), part = call.batch * stride;
    for (int r = 0; r < call.batch; ++r) {
        W* y = static_cast<W*>(call.y) + r * call.outputs;
        for (std::int64_t o = 0; o < call.outputs; o += C::kStep) {
            const float* from = call.sums + r * stride + o;
            typename S::F a = S::load(from), b = S::load(from + S::kLanes);
            for (int p = 1; p < call.parts; ++p) {
                a = S::add(a, S::load(from + p * part)), b = S::add(b, S::load(from + p * part + S::kLanes));
            }
            if (o + C::kStep <= call.outputs) {
                C::narrow(a, b, y + o);
                continue;
            }
            W last[C::kStep];
            C::narrow(a, b, last);
            std::memcpy(y + o, last, static_cast<std::size_t>(call.outputs - o) * sizeof *y);
        }
    }
}

template <class C>
void channel_outputs(const ChannelCall& call, std::int64_t begin, std::int64_t end) {
    switch (padded_batch(call.batch)) {
        case 1: return channel_outputs_of<C, 1>(call, begin, end);
        case 2: return channel_outputs_of<C, 2>(call, begin, end);
        case 4: return channel_outputs_of<C, 4>(call, begin, end);
        default: return channel_outputs_of<C, 8>(call, begin, end);
    }
}

}  // namespace gossamer
