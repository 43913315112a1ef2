// AVX-512 with VBMI2 and VNNI but without BF16 (Ice Lake): 16-bit floats are widened to float32.
#include "vector512.h"

#include "int8_avx512.h"
#include "rows_window.h"

namespace gossamer {
namespace {

template <class W>
using Dense = SplitDot<Channel<W>>;

template <class W>
using Words = WideWords<Channel<W>>;

template <class W>
using Mask = SplitMask<Channel<W>>;

template <class W>
using Dual = SplitDual<Channel<W>>;

}  // namespace
}  // namespace gossamer

#include "tier_table.h"

namespace gossamer {

const Tier* tier_avx512() {
    static constexpr Tier tier = make_tier("avx512");
    return &tier;
}

}  // namespace gossamer
