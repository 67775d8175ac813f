#include "training.h"

#if defined(__x86_64__)
  // Standard headers first: what they define is shared with code for older CPUs.
  #include <immintrin.h>

  #include <algorithm>
  #include <array>
  #include <cstdint>
  #include <cstring>
  #include <numeric>
  #include <type_traits>
  #include <utility>
  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
  #else
    #pragma GCC target("avx2,fma,f16c")
  #endif
  #include "training_kernel.h"
  #include "weight_gradient_kernel.h"

namespace fused_resnet::cpu {
constexpr TrainingKernel kTrainingAvx2 = TrainingImpl<8>::kernel();
using WeightGradientAvx2 = RegisterBlock<8, 4, 2>;
constexpr WeightGradientKernels kWeightGradientAvx2 = {
    WeightGradientImpl<WeightGradientAvx2, Winograd<2>>::kernel(),
    WeightGradientImpl<WeightGradientAvx2, Winograd<4>>::kernel()};
}  // namespace fused_resnet::cpu
  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
