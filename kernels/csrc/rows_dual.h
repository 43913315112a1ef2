// Sums of active channels of a matrix packed for dual sparsity, written once for all tiers.
//
// A format U gives: S (the vector unit), W, kStep (outputs per step), kParts = kStep / lanes, V (kStep weights, zeros
// where nothing is kept), block(mask, values, use), which calls use(i, V) for every step of 64 outputs and returns the
// address behind their values, split(V, parts), which makes floats of them in an order of its own, finish(sums, y), which
// undoes that order for 64 sums, kPer (channels that a multiplication adds) and kHold (how many times kPer channels stay
// in registers while the rows of x go by). With kPer = 2 also join(first, second, parts), which makes words of two channels'
// weights in the order of split, add(sum, word, factor), and factor(first, second) of two inputs.
// block may read 64 bytes beyond the last value: the packed tensor ends with that many.
#pragma once

#include <cstring>

#include "dual.h"
#include "gemv.h"

namespace gossamer {

// Channels whose chains of dependent loads (a mask says where the next one is) run side by side. 8 were 3 % slower.
constexpr int kDualGroup = 12;
constexpr std::int64_t kDualAhead = 4096;  // bytes; from 1 KiB on measured alike
constexpr int kDualTable = 4;              // groups ahead for which offsets are asked
constexpr std::int64_t kDualSums = 4096;   // floats, all rows of x: half of a first-level cache

// Where each channel of a group is, where its part ends, and how far from there the same channel of the next group begins.
struct DualGroup {
    const std::uint16_t* at[kDualGroup];
    const std::uint16_t* end[kDualGroup];
    std::int64_t jump[kDualGroup];  // bytes
};

// A channel's part is short, and the next one is anywhere: memory is asked for some way ahead in this part, and at its end
// in the one of the next group. Into the second-level cache, which can wait for far more lines at a time than the first:
// the product took 620 us one way and 505 us the other.
static inline void dual_prefetch(const DualGroup& group, int i, std::int64_t ahead) {
#if defined(__GNUC__) || defined(__clang__)
    const char* to = reinterpret_cast<const char*>(group.at[i]) + ahead;
    if (to >= reinterpret_cast<const char*>(group.end[i])) to += group.jump[i];
    __builtin_prefetch(to, 0, 2);
    __builtin_prefetch(to + 64, 0, 2);
#else
    (void)group, (void)i, (void)ahead;
#endif
}

static inline void dual_prefetch_offsets(const std::int32_t* begins, const std::int32_t* ends, std::int32_t channel) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(begins + channel);
    __builtin_prefetch(ends + channel);
#else
    (void)begins, (void)ends, (void)channel;
#endif
}

static inline std::uint64_t dual_mask(const std::uint16_t* at) {
    std::uint64_t mask;
    std::memcpy(&mask, at, 8);
    return mask;
}

// What weights are multiplied with: x of kCount channels [kCount][B], or of pairs of them [kCount / 2][B].
template <class U, int B, int kCount>
struct DualFactors {
    static constexpr int kPer = U::kPer, kUnits = (kCount + kPer - 1) / kPer;
    float of[kUnits * B];
    explicit DualFactors(const float* x) {
        for (int i = 0; i < kUnits; ++i) {
            for (int r = 0; r < B; ++r) {
                const float first = x[i * kPer * B + r];
                if constexpr (kPer == 1) {
                    of[i * B + r] = first;
                } else {
                    of[i * B + r] = U::factor(first, i * kPer + 1 < kCount ? x[(i * kPer + 1) * B + r] : 0.0f);
                }
            }
        }
    }
};

// Adds 64 outputs of kCount channels to sums [B][stride].
template <class U, int B, int kCount>
inline void dual_block(DualGroup& group, const DualFactors<U, B, kCount>& x, std::int64_t ahead, std::int64_t stride,
                       float* sums) {
    using S = typename U::S;
    using F = typename S::F;
    constexpr int kParts = static_cast<int>(dual::kBlock) / S::kLanes, kUnits = DualFactors<U, B, kCount>::kUnits;
    const auto walk = [&](int i, auto use) {  // use(step, V) for the 64 weights of channel i
        if (ahead != 0) dual_prefetch(group, i, ahead);
        const std::uint16_t* at = group.at[i];
        group.at[i] = U::block(dual_mask(at), at + dual::kMaskWords, use);
    };
    const auto weights = [&](int i, auto use) {  // use(part, F) for the 64 weights, or pairs of them, of unit i
        const auto parts_of = [&](int step, auto make) {
            F parts[U::kParts];
            make(parts);
            for (int p = 0; p < U::kParts; ++p) use(step * U::kParts + p, parts[p]);
        };
        if constexpr (U::kPer == 1) {
            walk(i, [&](int step, typename U::V v) { parts_of(step, [&](F* parts) { U::split(v, parts); }); });
        } else {
            typename U::V first[dual::kBlock / U::kStep], second[dual::kBlock / U::kStep] = {};
            walk(2 * i, [&](int step, typename U::V v) { first[step] = v; });
            if constexpr (kCount > 1) walk(2 * i + 1, [&](int step, typename U::V v) { second[step] = v; });
            for (int step = 0; step < static_cast<int>(dual::kBlock) / U::kStep; ++step) {
                parts_of(step, [&](F* parts) { U::join(first[step], second[step], parts); });
            }
        }
    };
    const auto add = [](F sum, F w, float factor) {
        if constexpr (U::kPer == 1) {
            return S::fma(S::set1(factor), w, sum);
        } else {
            return U::add(sum, w, factor);
        }
    };
    if constexpr (B == 1) {
        F sum[kParts];
        for (int p = 0; p < kParts; ++p) sum[p] = S::load(sums + p * S::kLanes);
        for (int i = 0; i < kUnits; ++i) {
            weights(i, [&](int p, F w) { sum[p] = add(sum[p], w, x.of[i]); });
        }
        for (int p = 0; p < kParts; ++p) S::store(sums + p * S::kLanes, sum[p]);
    } else {
        constexpr int kHold = kUnits < U::kHold ? kUnits : U::kHold;
        static_assert(kUnits % kHold == 0, "whole turns");
        for (int first = 0; first < kUnits; first += kHold) {
            F held[kHold][kParts];
            for (int i = 0; i < kHold; ++i) weights(first + i, [&](int p, F w) { held[i][p] = w; });
            for (int r = 0; r < B; ++r) {
                for (int p = 0; p < kParts; ++p) {
                    float* to = sums + r * stride + p * S::kLanes;
                    F sum = S::load(to);
                    for (int i = 0; i < kHold; ++i) sum = add(sum, held[i][p], x.of[(first + i) * B + r]);
                    S::store(to, sum);
                }
            }
        }
    }
}

// The bias of `count` outputs to sums [B][stride], in the order that split gives: as a block of which everything is kept.
template <class U, int B>
void dual_begin(const typename U::W* bias, std::int64_t count, std::int64_t stride, float* sums) {
    using S = typename U::S;
    for (std::int64_t o = 0; o < count; o += dual::kBlock) {
        typename U::W part[2 * dual::kBlock] = {};  // a block is read 64 bytes beyond its last value
        const std::int64_t here = count - o < dual::kBlock ? count - o : dual::kBlock;
        std::memcpy(part, bias + o, static_cast<std::size_t>(here) * sizeof *bias);
        U::block(~std::uint64_t{0}, reinterpret_cast<const std::uint16_t*>(part), [&](int step, typename U::V v) {
            typename S::F parts[U::kParts];
            U::split(v, parts);
            for (int p = 0; p < U::kParts; ++p) {
                for (int r = 0; r < B; ++r) S::store(sums + r * stride + o + (step * U::kParts + p) * S::kLanes, parts[p]);
            }
        });
    }
}

// Panels [begin, end), whose sums fit.
template <class U, int B>
void dual_panels(const DualCall& call, std::int64_t begin, std::int64_t end) {
    using S = typename U::S;
    const std::int64_t first = begin * dual::kPanel;
    const std::int64_t last = end * dual::kPanel < call.outputs ? end * dual::kPanel : call.outputs;
    const std::int64_t stride = (last - first + dual::kBlock - 1) / dual::kBlock * dual::kBlock;
    alignas(64) float sums[kDualSums];
    for (std::int64_t o = 0; o < stride * B; o += S::kLanes) S::store(sums + o, S::zero());
    if (call.bias != nullptr) {
        dual_begin<U, B>(static_cast<const typename U::W*>(call.bias) + first, last - first, stride, sums);
    }
    const std::int32_t* begins = call.offsets + begin * call.channels;
    const std::int32_t* ends = call.offsets + end * call.channels;
    const auto point = [&](std::int64_t n, int count, DualGroup& group) {
        for (int i = 0; i < count; ++i) {
            group.at[i] = call.stream + begins[call.active[n + i]];
            group.end[i] = call.stream + ends[call.active[n + i]];
        }
    };
    DualGroup groups[2];
    std::int64_t n = 0;
    if (kDualGroup <= call.count) point(0, kDualGroup, groups[0]);
    for (int now = 0; n + kDualGroup <= call.count; n += kDualGroup, now = 1 - now) {
        DualGroup& group = groups[now];
        const DualGroup& next = groups[1 - now];
        std::int64_t ahead = 0;
        if (n + 2 * kDualGroup <= call.count) {
            const std::int64_t later = n + kDualTable * kDualGroup;
            if (later < call.count) dual_prefetch_offsets(begins, ends, call.active[later]);
            point(n + kDualGroup, kDualGroup, groups[1 - now]);
            const std::int64_t bytes = 2 * (group.end[0] - group.at[0]);
            ahead = bytes < kDualAhead ? bytes : kDualAhead;
            for (int i = 0; i < kDualGroup; ++i) group.jump[i] = 2 * (next.at[i] - group.end[i]);
        }
        const DualFactors<U, B, kDualGroup> x(call.x + n * B);
        for (std::int64_t o = 0; o < stride; o += dual::kBlock) {
            dual_block<U, B, kDualGroup>(group, x, ahead, stride, sums + o);
        }
    }
    for (; n < call.count; ++n) {
        point(n, 1, groups[0]);
        const DualFactors<U, B, 1> x(call.x + n * B);
        for (std::int64_t o = 0; o < stride; o += dual::kBlock) {
            dual_block<U, B, 1>(groups[0], x, 0, stride, sums + o);
        }
    }
    if (call.sums != nullptr) {
        for (int r = 0; r < call.batch; ++r) {
            float* to = call.sums + r * sums_stride(call.outputs) + first;
            std::memcpy(to, sums + r * stride, static_cast<std::size_t>(stride) * sizeof *to);
        }
        return;
    }
    for (int r = 0; r < call.batch; ++r) {
        auto* y = static_cast<typename U::W*>(call.y) + r * call.outputs + first;
        for (std::int64_t o = 0; o < stride; o += dual::kBlock) {
            const std::int64_t left = last - first - o;
            if (left >= dual::kBlock) {
                U::finish(sums + r * stride + o, y + o);
                continue;
            }
            typename U::W part[dual::kBlock];
            U::finish(sums + r * stride + o, part);
            std::memcpy(y + o, part, static_cast<std::size_t>(left) * sizeof *y);
        }
    }
}

// y of the sums of several parts.
template <class U>
void dual_finish(const FinishCall& call) {
    using S = typename U::S;
    const std::int64_t stride = sums_stride(call.outputs), part = call.batch * stride;
    for (int r = 0; r < call.batch; ++r) {
        auto* y = static_cast<typename U::W*>(call.y) + r * call.outputs;
        for (std::int64_t o = 0; o < call.outputs; o += dual::kBlock) {
            alignas(64) float sums[dual::kBlock];
            for (std::int64_t i = 0; i < dual::kBlock; i += S::kLanes) {
                const float* from = call.sums + r * stride + o + i;
                typename S::F sum = S::load(from);
                for (int p = 1; p < call.parts; ++p) sum = S::add(sum, S::load(from + p * part));
                S::store(sums + i, sum);
            }
            if (o + dual::kBlock <= call.outputs) {
                U::finish(sums, y + o);
                continue;
            }
            typename U::W last[dual::kBlock];
            U::finish(sums, last);
            std::memcpy(y + o, last, static_cast<std::size_t>(call.outputs - o) * sizeof *y);
        }
    }
}

template <class U, int B>
void dual_outputs_of(const DualCall& call, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kPanels = kDualSums / B / dual::kPanel;
    static_assert(kPanels > 0, "the sums of a panel fit");
    for (std::int64_t panel = begin; panel < end; panel += kPanels) {
        dual_panels<U, B>(call, panel, panel + kPanels < end ? panel + kPanels : end);
    }
}

template <class U>
void dual_outputs(const DualCall& call, std::int64_t begin, std::int64_t end) {
    switch (padded_batch(call.batch)) {
        case 1: return dual_outputs_of<U, 1>(call, begin, end);
        case 2: return dual_outputs_of<U, 2>(call, begin, end);
        case 4: return dual_outputs_of<U, 4>(call, begin, end);
        default: return dual_outputs_of<U, 8>(call, begin, end);
    }
}

}  // namespace gossamer
