// Winograd on matrix tiles, for the instruction set of the target_*.h before it. The last include of a file.
#pragma once

#if defined(FR_TILES)
  #include "bf16x3_winograd.h"

namespace fused_resnet::cpu {
template <>
void add_bf16x3_winograd<FR_ISA>(Kernels& set) {
  set.bf16x3_winograd2 = Bf16x3Winograd<FR_TILES, FR_TILE_LANES, Winograd<2>>::kernel();
  set.bf16x3_winograd4 = Bf16x3Winograd<FR_TILES, FR_TILE_LANES, Winograd<4>>::kernel();
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
