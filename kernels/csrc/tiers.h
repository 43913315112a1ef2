// Which tiers this build and this processor have.
#pragma once

#include "gemv.h"

namespace gossamer {

constexpr int kTiers = 5;

// Tier 0 (the fastest) to kTiers - 1, or nullptr where it was not compiled or the processor cannot run it.
const Tier* tier_at(int index);

}  // namespace gossamer
