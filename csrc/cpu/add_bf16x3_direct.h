// Direct convolution on matrix tiles, with a max pool too, for the instruction set of the target_*.h before
// it. The last include of a file.
#pragma once

#if defined(FR_TILES)
  #include "bf16x3_direct.h"
  #include "bf16x3_stem.h"
  #include "pooled_kernel.h"

namespace fused_resnet::cpu {
template <>
void add_bf16x3_direct<FR_ISA>(Kernels& set) {
  set.bf16x3_direct = Bf16x3Direct<FR_TILES, FR_TILE_LANES, false>::kernel();
  set.fresh_bf16x3_direct = Bf16x3Direct<FR_TILES, FR_TILE_LANES, true>::kernel();
  set.bf16x3_stem = PooledRows<Bf16x3Stem<FR_TILES, FR_TILE_LANES>>::kernel();
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
