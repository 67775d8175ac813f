// Direct convolution, with a max pool too, and the epilogue alone, for the instruction set of the target_*.h
// before it. The last include of a file.
#pragma once

#if defined(FR_BLOCK)
  #include "checksum_kernel.h"
  #include "direct_kernel.h"
  #include "epilogue_kernel.h"
  #include "pooled_kernel.h"

namespace fused_resnet::cpu {
template <>
void add_direct<FR_ISA>(Kernels& set) {
  set.direct = DirectImpl<FR_BLOCK>::kernel();
  set.pooled = PooledImpl<FR_BLOCK>::kernel();
  set.epilogue = EpilogueImpl<FR_BLOCK::kLanes>::kernel();
  set.checksum = ChecksumImpl<FR_BLOCK::kLanes>::run;
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
