// Winograd on matrix tiles, for the instruction set of the target_*.h before it. The last include of a file.
#pragma once

#if defined(FR_TILES)
  #include "winograd_split.h"

namespace fused_resnet::cpu {
template <>
void add_split_winograd<FR_ISA>(Kernels& set) {
  set.split_winograd2 = SplitWinogradImpl<FR_TILES, FR_TILE_LANES, Winograd<2>>::kernel();
  set.split_winograd4 = SplitWinogradImpl<FR_TILES, FR_TILE_LANES, Winograd<4>>::kernel();
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
