// Unrolling of loops over sums.
#pragma once

// Sums must stay in registers, so vector tiers unroll everything over them; the scalar tier has no registers for that.
#if defined(GOSSAMER_VECTORS)
#define GOSSAMER_PRAGMA(text) _Pragma(#text)
#define GOSSAMER_UNROLL(count) GOSSAMER_PRAGMA(GCC unroll count)
#else
#define GOSSAMER_UNROLL(count)
#endif
