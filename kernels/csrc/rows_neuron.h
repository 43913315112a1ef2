// Rows of two matrices with the same x, for the neurons of a gated MLP, written once for all tiers. D: see rows_dense.h.
#pragma once

#include "neuron.h"
#include "rows_dense.h"

namespace gossamer {

template <class D, int B>
void neuron_rows_of(const NeuronCall& call, int first, std::int64_t n, std::int64_t end) {
    using W = typename D::W;
    const auto row = [&](const void* matrix, std::int64_t at) {
        return static_cast<const W*>(matrix) + call.active[at] * call.cols;
    };
    const W* gate = row(call.gate, n);
    const W* up = row(call.up, n);
    const W* next_gate = n + 1 < end ? row(call.gate, n + 1) : gate;
    const W* next_up = n + 1 < end ? row(call.up, n + 1) : up;
    // Of short rows, the one after next: the next row alone is too near.
    const bool near = scattered_ahead<W>(call.cols) == call.cols;
    const int padded = padded_batch(call.batch);
    const std::uint8_t* x = call.x + first * call.stride;
    dense_row<D, B, true>(gate, call.cols, x, call.stride, call.gates + n * padded + first,
                          near ? next_gate : up);
    dense_row<D, B, true>(up, call.cols, x, call.stride, call.ups + n * padded + first,
                          near ? next_up : next_gate);
}

template <class D>
void neuron_rows(const NeuronCall& call, std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
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
