// Winograd F(2 x 2, 3 x 3), with transformed and with fresh weights, for the instruction set of the
// target_*.h before it. The last include of a file.
#pragma once

#if defined(FR_BLOCK)
  #include "winograd_fresh.h"
  #include "winograd_kernel.h"

namespace fused_resnet::cpu {
template <>
void add_winograd2<FR_ISA>(Kernels& set) {
  set.winograd2 = WinogradImpl<FR_BLOCK, Winograd<2>>::kernel();
  set.fresh_winograd2 = FreshWinogradImpl<FR_BLOCK, Winograd<2>>::kernel();
}
}  // namespace fused_resnet::cpu
#endif

#if defined(FR_TARGET_PUSHED)
  #pragma clang attribute pop
#endif
