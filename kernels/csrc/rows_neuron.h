// Rows of two matrices with the same x, for the neurons of a gated MLP, written once for all tiers. D: see rows_dense.h.
#pragma once

#include "neuron.h"
#include "rows_dense.h"

namespace gossamer {

// Row of an active neuron; behind the last one its own again.
template <class D>
const typename D::W* neuron_row(const NeuronCall& call, const void* matrix, std::int64_t n, std::int64_t end) {
    return static_cast<const typename D::W*>(matrix) + call.active[n < end ? n : end - 1] * call.cols;
}

// One neuron: the gate row, then the up row.
template <class D, int B>
void neuron_rows_of(const NeuronCall& call, int first, std::int64_t n, std::int64_t end) {
    using W = typename D::W;
    const W* gate = neuron_row<D>(call, call.gate, n, end);
    const W* up = neuron_row<D>(call, call.up, n, end);
    const W* next_gate = neuron_row<D>(call, call.gate, n + 1, end);
    const W* next_up = neuron_row<D>(call, call.up, n + 1, end);
    // Of short rows, the one after next: the next row alone is too near.
    const bool near = scattered_ahead<D>(call.cols) == call.cols;
    const std::int64_t at = n * padded_batch(call.batch) + first;
    const auto run = [&](const W* row, const W* next, float* to) {
        float out[1][B];
        dense_side_by_side<D, B, 1, true>(&row, call.cols, call.x + first * call.stride, call.stride, out, &next);
        for (int b = 0; b < B; ++b) to[b] = out[0][b];
    };
    run(gate, near ? next_gate : up, call.gates + at);
    run(up, near ? next_up : next_gate, call.ups + at);
}

// One row of x, several neurons side by side. Returns the first that is left.
template <class D, int kNeurons>
std::int64_t neuron_rows_together(const NeuronCall& call, std::int64_t n, std::int64_t end) {
    using W = typename D::W;
    for (; n + kNeurons <= end; n += kNeurons) {
        const W *rows[2 * kNeurons], *next[2 * kNeurons];
        for (int i = 0; i < 2 * kNeurons; ++i) {
            const void* matrix = i < kNeurons ? call.gate : call.up;
            rows[i] = neuron_row<D>(call, matrix, n + i % kNeurons, end);
            next[i] = neuron_row<D>(call, matrix, n + i % kNeurons + kNeurons, end);
        }
        float out[2 * kNeurons][1];
        dense_side_by_side<D, 1, 2 * kNeurons, true>(rows, call.cols, call.x, call.stride, out, next);
        for (int i = 0; i < kNeurons; ++i) call.gates[n + i] = out[i][0], call.ups[n + i] = out[kNeurons + i][0];
    }
    return n;
}

template <class D>
void neuron_rows(const NeuronCall& call, std::int64_t begin, std::int64_t end) {
    std::int64_t n = begin;
    if constexpr (D::kTogether > 1) {
        if (call.batch == 1) n = neuron_rows_together<D, D::kTogether / 2>(call, begin, end);
    }
    for (; n < end; ++n) {
        switch (padded_batch(call.batch)) {
            case 1: neuron_rows_of<D, 1>(call, 0, n, end); break;
            case 2: neuron_rows_of<D, 2>(call, 0, n, end); break;
            case 4: neuron_rows_of<D, 4>(call, 0, n, end); break;
            default:  // as many sums as there are registers; the second time the rows come from the cache
                neuron_rows_of<D, 4>(call, 0, n, end);
                neuron_rows_of<D, 4>(call, 4, n, end);
        }
    }
}

}  // namespace gossamer
