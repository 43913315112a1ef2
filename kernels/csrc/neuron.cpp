#include "neuron.h"

#include "work.h"

namespace gossamer {
namespace {

constexpr std::int64_t kSplit = 64;  // outputs; whole lines of the narrowest dtype

bool rises(const std::int32_t* active, std::int64_t count, std::int64_t limit) {
    if (count == 0) return true;
    bool wrong = active[0] < 0 || active[count - 1] >= limit;
    for (std::int64_t i = 1; i < count; ++i) wrong |= active[i] <= active[i - 1];
    return !wrong;
}

}  // namespace

bool neuron_mlp(const Tier& tier, int dtype, const void* x, int batch, const Mlp& mlp, const std::int32_t* active,
                std::int64_t count, void* y, int threads) {
    if (!rises(active, count, mlp.neurons)) return false;
    const Prepared made = prepare<0>(tier.dense_row, tier.dense_prepare, dtype, x, batch, mlp.hidden);
    const std::int64_t padded = padded_batch(batch), size = count * padded;
    auto* gates = reinterpret_cast<float*>(scratch<1>(8 * size));
    const NeuronCall call{mlp.gate,  mlp.up, mlp.hidden, active,      made.rows,
                          made.stride, batch,  gates,      gates + size};
    const std::int64_t bytes = count * mlp.hidden * element_size(dtype);
    int parts = parts_for(2 * bytes, threads);
    in_parts(parts, [&](int part) {
        const std::int64_t begin = count * part / parts, end = count * (part + 1) / parts;
        tier.neuron_run(dtype, call, begin, end);
        tier.gate(kFloat32, mlp.activation, call.gates + begin * padded, call.ups + begin * padded, (end - begin) * padded);
    });
    const ChannelCall down{mlp.down_t, mlp.hidden, active, count, gates, batch, y, nullptr};
    const std::int64_t blocks = (mlp.hidden + kSplit - 1) / kSplit;
    parts = parts_for(bytes, threads);
    in_parts(parts, [&](int part) {
        const std::int64_t begin = blocks * part / parts * kSplit;
        const std::int64_t end = std::min(mlp.hidden, blocks * (part + 1) / parts * kSplit);
        if (begin < end) tier.channel_run(dtype, down, begin, end);
    });
    return true;
}

}  // namespace gossamer
