#include "isa.h"

#if defined(__x86_64__)
  // Standard headers first: what they define is shared with code for older CPUs.
  #include <immintrin.h>

  #include <algorithm>
  #include <array>
  #include <cstdint>
  #include <cstring>
  #include <type_traits>
  #include <utility>
  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
  #else
    #pragma GCC target("avx2,fma,f16c")
  #endif
  #include "checksum_kernel.h"
  #include "direct_kernel.h"
  #include "epilogue_kernel.h"
  #include "pooled_kernel.h"
  #include "winograd_fresh.h"
  #include "winograd_kernel.h"

namespace fused_resnet::cpu {
using Avx2 = RegisterBlock<8, 6, 2>;
const Kernels kKernelsAvx2 = {"avx2",
                              "avx2",
                              DirectImpl<Avx2>::kernel(),
                              WinogradImpl<Avx2, Winograd<2>>::kernel(),
                              WinogradImpl<Avx2, Winograd<4>>::kernel(),
                              FreshWinogradImpl<Avx2, Winograd<2>>::kernel(),
                              FreshWinogradImpl<Avx2, Winograd<4>>::kernel(),
                              PooledImpl<Avx2>::kernel(),
                              EpilogueImpl<Avx2::kLanes>::kernel(),
                              ChecksumImpl<Avx2::kLanes>::run};
}  // namespace fused_resnet::cpu
  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
