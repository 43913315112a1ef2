// Attention over rows of keys and values, written once for all tiers.
//
// A channel format C (rows_channel.h) gives the values; a word format K the keys: S, W, kPer (elements in one word of 32
// bits as the tile holds them), word(w) -> F (kLanes words), mul(acc, F of words, q) -> acc + the products with one word of
// a prepared query, and query(from, count, to), which prepares `count` words.
#pragma once

#include <cstring>

#include "unroll.h"
#include "window.h"

namespace gossamer {

// Words are widened elements, unless a tier multiplies pairs.
template <class C>
struct WideWords {
    using S = typename C::S;
    using W = typename C::W;
    using F = typename S::F;
    static constexpr int kPer = 1;
    static F word(const W* w) { return C::row(w); }
    static F mul(F acc, F words, const float* q) { return S::fma(words, S::set1(*q), acc); }
    static void query(const W* from, std::int64_t count, float* to) {
        for (std::int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    }
};

template <class C, class K>
struct WindowOf {
    using S = typename C::S;
    using W = typename C::W;
    using F = typename S::F;
    static constexpr int kLanes = S::kLanes, kStep = C::kStep, kBlock = kLanes * K::kPer, kRows = 64;
    static constexpr int kStride = kWindowChunk + 16;  // of scores: a power of two would put all queries into one cache set
    static constexpr std::int64_t kAhead = 4096;       // bytes
    static_assert(kStep == 2 * kLanes, "a step is two vectors");

    static std::int64_t padded(std::int64_t width, std::int64_t step) { return (width + step - 1) / step * step; }
    static std::int64_t words(std::int64_t width) { return padded(width, kBlock) / K::kPer; }

    static WindowSizes sizes(int group, std::int64_t width) {
        return {words(width), padded(width, kStep), words(width) * kLanes + group * std::int64_t{kStride}};
    }

    static void prepare(const W* query, std::int64_t width, float* to) {
        const std::int64_t whole = width / K::kPer;
        std::memset(to, 0, static_cast<std::size_t>(4 * words(width)));
        K::query(query, whole, to);
        if (whole * K::kPer == width) return;
        W last[K::kPer] = {};
        for (std::int64_t i = whole * K::kPer; i < width; ++i) last[i - whole * K::kPer] = query[i];
        K::query(last, 1, to + whole);
    }

    // Keys as columns: word w of kLanes keys becomes one vector.
    static void turn(const W* const* rows, std::int64_t width, float* tile) {
        F block[kLanes];
        for (std::int64_t k = 0; k < width; k += kBlock, tile += kLanes * kLanes) {
            if (k + kBlock <= width) {
                for (int i = 0; i < kLanes; ++i) block[i] = K::word(rows[i] + k);
            } else {
                for (int i = 0; i < kLanes; ++i) {
                    W last[kBlock] = {};
                    std::memcpy(last, rows[i] + k, static_cast<std::size_t>(width - k) * sizeof(W));
                    block[i] = K::word(last);
                }
            }
            S::transpose(block);
            for (int i = 0; i < kLanes; ++i) S::store(tile + i * kLanes, block[i]);
        }
    }

    // Scores of kLanes keys with Q queries. Always the same chains, summed in the same order.
    template <int Q>
    static void score(const float* tile, std::int64_t count, const float* query, float scale, float* out) {
        constexpr int kChains = Q >= 4 ? 1 : 4;
        F acc[Q][kChains];
        GOSSAMER_UNROLL(8)
        for (int q = 0; q < Q; ++q) {
            for (int c = 0; c < kChains; ++c) acc[q][c] = S::zero();
        }
        for (std::int64_t w = 0; w < count; w += kChains) {
            GOSSAMER_UNROLL(4)
            for (int c = 0; c < kChains; ++c) {
                const F words = S::load(tile + (w + c) * kLanes);
                GOSSAMER_UNROLL(8)
                for (int q = 0; q < Q; ++q) acc[q][c] = K::mul(acc[q][c], words, query + q * count + w + c);
            }
        }
        GOSSAMER_UNROLL(8)
        for (int q = 0; q < Q; ++q) {
            F sum = acc[q][0];
            if (kChains == 4) sum = S::add(S::add(acc[q][0], acc[q][1 % kChains]), S::add(acc[q][2 % kChains], acc[q][3 % kChains]));
            S::store(out + q * kStride, S::fma(sum, S::set1(scale), S::zero()));
        }
    }

    // exp(x) for x <= 0; NaN stays NaN. Below -87 it is exp(-87), which is nothing beside the 1 that every sum has.
    static F exp(F x) {
        x = S::max(S::set1(-87.0f), x);
        const F magic = S::set1(12582912.0f);  // 1.5 * 2^23: rounds to whole numbers
        const F n = S::add(S::fma(x, S::set1(1.44269504f), magic), S::set1(-12582912.0f));
        F r = S::fma(n, S::set1(-0.693359375f), x);
        r = S::fma(n, S::set1(2.12194440e-4f), r);
        F p = S::set1(1.9875691500e-4f);
        p = S::fma(p, r, S::set1(1.3981999507e-3f));
        p = S::fma(p, r, S::set1(8.3334519073e-3f));
        p = S::fma(p, r, S::set1(4.1665795894e-2f));
        p = S::fma(p, r, S::set1(1.6666665459e-1f));
        p = S::fma(p, r, S::set1(5.0000001201e-1f));
        p = S::fma(S::fma(p, r, S::zero()), r, S::add(r, S::set1(1.0f)));
        return S::scale2(p, n);
    }

    // Scores [count] become weights; zeros up to a whole vector.
    static void soften(float* scores, std::int64_t count, float* best, float* total) {
        const float low = scores[0];
        const std::int64_t whole = padded(count, kLanes);
        for (std::int64_t i = count; i < whole; ++i) scores[i] = low;
        F top = S::set1(low);
        for (std::int64_t i = 0; i < whole; i += kLanes) top = S::max(top, S::load(scores + i));
        float lanes[kLanes];
        S::store(lanes, top);
        float greatest = lanes[0];
        for (int i = 1; i < kLanes; ++i) greatest = lanes[i] > greatest ? lanes[i] : greatest;
        const F minus = S::set1(-greatest);
        F sum = S::zero();
        for (std::int64_t i = 0; i < whole; i += kLanes) {
            S::store(scores + i, exp(S::add(S::load(scores + i), minus)));
            if (i + kLanes > count) {
                for (std::int64_t j = count; j < whole; ++j) scores[j] = 0.0f;
            }
            sum = S::add(sum, S::load(scores + i));
        }
        *best = greatest;
        *total = S::sum(sum);
    }

    // Sums of Q queries over `count` rows, for the channels of one step from `k` on.
    template <int Q>
    static void add(const W* values, std::int64_t width, std::int64_t count, std::int64_t k, const float* weights,
                    float* sums, std::int64_t stride) {
        F a[Q], b[Q];
        GOSSAMER_UNROLL(8)
        for (int q = 0; q < Q; ++q) {
            a[q] = S::load(sums + q * stride + k);
            b[q] = S::load(sums + q * stride + k + kLanes);
        }
        const bool partial = k + kStep > width;
        W last[kStep] = {};
        for (std::int64_t i = 0; i < count; ++i) {
            const W* from = values + i * width + k;
            ask_for(reinterpret_cast<const char*>(from) + kAhead, 1);
            if (partial) {
                std::memcpy(last, from, static_cast<std::size_t>(width - k) * sizeof(W));
                from = last;
            }
            F x, y;
            C::widen(from, x, y);
            GOSSAMER_UNROLL(8)
            for (int q = 0; q < Q; ++q) {
                const F weight = S::set1(weights[q * kStride + i]);
                a[q] = S::fma(x, weight, a[q]);
                b[q] = S::fma(y, weight, b[q]);
            }
        }
        GOSSAMER_UNROLL(8)
        for (int q = 0; q < Q; ++q) {
            S::store(sums + q * stride + k, a[q]);
            S::store(sums + q * stride + k + kLanes, b[q]);
        }
    }

    // Calls with the queries in groups of 8, 4, 2 and 1.
    template <class Use>
    static void by_queries(int group, Use use) {
        int q = 0;
        for (; q + 8 <= group; q += 8) use(q, Count<8>{});
        if (q + 4 <= group) use(q, Count<4>{}), q += 4;
        if (q + 2 <= group) use(q, Count<2>{}), q += 2;
        if (q < group) use(q, Count<1>{});
    }
    template <int Q>
    struct Count {
        static constexpr int value = Q;
    };

    static void run(const WindowPart& part) {
        const std::int64_t width = part.width, count = words(width), stride = padded(width, kStep);
        auto* tile = reinterpret_cast<float*>(part.room);
        float* scores = tile + count * kLanes;
        const std::int64_t all = part.count[0] + part.count[1];
        const int lines = static_cast<int>((kLanes * width * static_cast<std::int64_t>(sizeof(W)) + 63) / 64);
        const auto row = [&](const void* const* runs, std::int64_t i) {
            const int which = i >= part.count[0];
            return static_cast<const W*>(runs[which]) + (i - (which ? part.count[0] : 0)) * width;
        };
        for (std::int64_t i = 0; i < all; i += kLanes) {
            const W* rows[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) rows[lane] = row(part.keys, i + lane < all ? i + lane : all - 1);
            ask_for(reinterpret_cast<const char*>(rows[0]) + kAhead, lines);
            turn(rows, width, tile);
            by_queries(part.group, [&](int q, auto queries) {
                score<decltype(queries)::value>(tile, count, part.query + q * count, part.scale,
                                                scores + q * kStride + i);
            });
        }
        for (int q = 0; q < part.group; ++q) soften(scores + q * kStride, all, part.best + q, part.total + q);
        std::memset(part.sums, 0, static_cast<std::size_t>(4 * part.group * stride));
        std::int64_t done = 0;
        for (int which = 0; which < 2; ++which) {
            const auto* values = static_cast<const W*>(part.values[which]);
            for (std::int64_t i = 0; i < part.count[which]; i += kRows) {
                const std::int64_t some = part.count[which] - i < kRows ? part.count[which] - i : kRows;
                for (std::int64_t k = 0; k < width; k += kStep) {
                    by_queries(part.group, [&](int q, auto queries) {
                        add<decltype(queries)::value>(values + i * width, width, some, k,
                                                      scores + q * kStride + done + i, part.sums + q * stride,
                                                      stride);
                    });
                }
            }
            done += part.count[which];
        }
    }

    // Sums divided by their total, in the order of channels, rounded once.
    static void finish(const float* sums, float total, std::int64_t width, W* y) {
        const F factor = S::set1(1.0f / total);
        for (std::int64_t k = 0; k < width; k += kStep) {
            const F a = S::fma(S::load(sums + k), factor, S::zero());
            const F b = S::fma(S::load(sums + k + kLanes), factor, S::zero());
            if (k + kStep <= width) {
                C::narrow(a, b, y + k);
            } else {
                W last[kStep];
                C::narrow(a, b, last);
                std::memcpy(y + k, last, static_cast<std::size_t>(width - k) * sizeof(W));
            }
        }
    }
};

}  // namespace gossamer
