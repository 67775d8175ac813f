// Four lanes: SSE2 or NEON, or whatever the compiler makes of its vector extension.
// To be included first by a file that has nothing else than kernels (isa_portable_*.cpp).
#pragma once

#include "isa.h"

#define FR_ISA Portable
#define FR_BLOCK RegisterBlock<4, 6, 2>
#define FR_BF16_BLOCK Bf16Block<4, 6, 2>
#define FR_BF16_WINOGRAD_BLOCK RegisterBlock<4, 6, 2, BFloat16>
#define FR_TILES PlainTiles
#define FR_TILE_LANES 4
