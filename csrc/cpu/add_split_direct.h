// Direct convolution on matrix tiles, with a max pool too, for the instruction set of the target_*.h before
// it. The last include of a file.
#pragma once

#if defined(FR_TILES)
  #include "pooled_kernel.h"
  #include "split_kernel.h"
  #include "split_rows.h"

namespace fused_resnet::cpu {
template <>
void add_split_direct<FR_ISA>(Kernels& set) {
  set.split_direct = SplitImpl<FR_TILES, FR_TILE_LANES, false>::kernel();
  set.fresh_split_direct = SplitImpl<FR_TILES, FR_TILE_LANES, true>::kernel();
  set.split_pooled = PooledRows<SplitRows<FR_TILES, FR_TILE_LANES>>::kernel();
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
