// Winograd F(2 x 2, 3 x 3) of bfloat16 activations, with transformed and with fresh weights, for the
// instruction set of the target_*.h before it. The last include of a file.
#pragma once

#if defined(FR_BF16_BLOCK)
  #include "scalars.h"
  #include "winograd_fresh.h"
  #include "winograd_kernel.h"

namespace fused_resnet::cpu {
template <>
void add_bf16_winograd2<FR_ISA>(Kernels& set) {
  set.bf16_winograd2 = WinogradImpl<FR_BF16_WINOGRAD_BLOCK, Winograd<2>>::kernel();
  set.bf16_fresh_winograd2 = FreshWinogradImpl<FR_BF16_WINOGRAD_BLOCK, Winograd<2>>::kernel();
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
