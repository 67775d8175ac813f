// Direct convolution in bfloat16, with a max pool too, for the instruction set of the target_*.h before it.
// The last include of a file.
#pragma once

#if defined(FR_BF16_BLOCK)
  #include "bf16_block.h"
  #include "direct_kernel.h"
  #include "pooled_kernel.h"

namespace fused_resnet::cpu {
template <>
void add_bf16_direct<FR_ISA>(Kernels& set) {
  set.bf16_direct = DirectImpl<FR_BF16_BLOCK>::kernel();
  set.bf16_pooled = PooledImpl<FR_BF16_BLOCK>::kernel();
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
