#include "training.h"

#if defined(__x86_64__)
  // Standard headers first: what they define is shared with code for older CPUs.
  #include <immintrin.h>

  #include <cstdint>
  #include <cstring>
  #include <type_traits>
  #include <utility>
  #pragma GCC target("avx2,fma")
  #include "training_kernel.h"

namespace fused_resnet::cpu {
constexpr TrainingKernel kTrainingAvx2 = TrainingImpl<8>::kernel("avx2");
}  // namespace fused_resnet::cpu
#endif
