// Sums of active rows of W^T [channels, outputs], written once for all tiers.
//
// A format C gives: S (the vector unit), W, kStep = 2 lanes, widen(w, a, b): kStep weights as two vectors of floats in
// an order of its own, narrow(a, b, out), which undoes that order, and prefetch(w).
#pragma once

#include "gemv.h"

namespace gossamer {

constexpr int kGroup = 16;                    // channels read side by side; 8 were 5 to 15 % slower, 24 twice as slow
constexpr std::int64_t kAheadOutputs = 1024;  // how far ahead of the sums weights are asked for, into the second level
constexpr std::int64_t kBlockFloats = 4096;   // sums of a block of outputs, all rows of x: half of a first-level cache

// Adds kCount channels to the sums [B][outputs] of outputs [0, outputs), a multiple of kStep.
template <class C, int B, int kCount>
inline void channel_group(const typename C::W* const* rows, const float* x, std::int64_t outputs, float* sums,
                          const typename C::W* const* next) {
    using S = typename C::S;
    using F = typename S::F;
    constexpr int kHold = B == 1 ? kCount : 2;  // widened rows that stay in registers while the rows of x go by
    for (std::int64_t o = 0; o < outputs; o += C::kStep) {
        // Jumping from channel to channel leaves the processor's own prefetchers without a stream to follow.
        const std::int64_t ahead = o + kAheadOutputs;
        if (next != nullptr) {
            const bool over = ahead >= outputs;
            for (int i = 0; i < kCount; ++i) C::prefetch(over ? next[i] + (ahead - outputs) : rows[i] + ahead);
        }
        if constexpr (B == 1) {
            F a = S::load(sums + o), b = S::load(sums + o + S::kLanes);
            for (int i = 0; i < kCount; ++i) {
                F u, v;
                C::widen(rows[i] + o, u, v);
                const F value = S::set1(x[i]);
                a = S::fma(value, u, a);
                b = S::fma(value, v, b);
            }
            S::store(sums + o, a);
            S::store(sums + o + S::kLanes, b);
        } else {
            for (int first = 0; first < kCount; first += kHold) {
                constexpr int kHere = kHold < kCount ? kHold : kCount;
                F u[kHere], v[kHere];
                for (int i = 0; i < kHere; ++i) C::widen(rows[first + i] + o, u[i], v[i]);
                for (int r = 0; r < B; ++r) {
                    float* sum = sums + r * outputs + o;
                    F a = S::load(sum), b = S::load(sum + S::kLanes);
                    for (int i = 0; i < kHere; ++i) {
                        const F value = S::set1(x[(first + i) * B + r]);
                        a = S::fma(value, u[i], a);
                        b = S::fma(value, v[i], b);
                    }
                    S::store(sum, a);
                    S::store(sum + S::kLanes, b);
                }
            }
        }
    }
}

// Outputs [begin, end), end - begin a multiple of kStep and at most a block.
template <class C, int B>
void channel_block(const ChannelCall& call, std::int64_t begin, std::int64_t end) {
    using W = typename C::W;
    using S = typename C::S;
    const W* weight = static_cast<const W*>(call.weight) + begin;
    const std::int64_t outputs = end - begin;
    alignas(64) float sums[kBlockFloats];
    for (std::int64_t o = 0; o < outputs * B; o += S::kLanes) S::store(sums + o, S::zero());
    const W* rows[2][kGroup];
    const auto point = [&](std::int64_t first, const W** to) {
        for (int i = 0; i < kGroup; ++i) to[i] = weight + call.active[first + i] * call.outputs;
    };
    std::int64_t i = 0;
    if (kGroup <= call.count) point(0, rows[0]);
    for (int now = 0; i + kGroup <= call.count; i += kGroup, now = 1 - now) {
        const bool more = i + 2 * kGroup <= call.count;
        if (more) point(i + kGroup, rows[1 - now]);
        channel_group<C, B, kGroup>(rows[now], call.x + i * B, outputs, sums, more ? rows[1 - now] : nullptr);
    }
    for (; i < call.count; ++i) {
        const W* row = weight + call.active[i] * call.outputs;
        channel_group<C, B, 1>(&row, call.x + i * B, outputs, sums, nullptr);
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
    for (int o = 0; o < B * C::kStep; o += S::kLanes) S::store(sums + o, S::zero());
    W part[C::kStep] = {};
    const W* row = part;
    for (std::int64_t i = 0; i < call.count; ++i) {
        for (std::int64_t o = 0; o < end - begin; ++o) part[o] = weight[call.active[i] * call.outputs + o];
        channel_group<C, B, 1>(&row, call.x + i * B, C::kStep, sums, nullptr);
    }
    for (int r = 0; r < call.batch; ++r) {
        const float* sum = sums + r * C::kStep;
        C::narrow(S::load(sum), S::load(sum + S::kLanes), part);
        for (std::int64_t o = begin; o < end; ++o) {
            static_cast<W*>(call.y)[r * call.outputs + o] = part[o - begin];
        }
    }
}

template <class C, int B>
void channel_outputs_of(const ChannelCall& call, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kBlock = kBlockFloats / B;
    const std::int64_t whole = begin + (end - begin) / C::kStep * C::kStep;
    for (std::int64_t o = begin; o < whole; o += kBlock) {
        channel_block<C, B>(call, o, o + kBlock < whole ? o + kBlock : whole);
    }
    if (whole < end) channel_rest<C, B>(call, whole, end);
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
