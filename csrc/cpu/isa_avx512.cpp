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
    #pragma clang attribute push( \
        __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
  #else
    #pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
  #endif
  #include "checksum_kernel.h"
  #include "direct_kernel.h"
  #include "epilogue_kernel.h"
  #include "pooled_kernel.h"
  #include "winograd_fresh.h"
  #include "winograd_kernel.h"

namespace fused_resnet::cpu {
using Avx512 = RegisterBlock<16, 14, 2>;
const Kernels kKernelsAvx512 = {"avx512",
                                "avx512",
                                DirectImpl<Avx512>::kernel(),
                                WinogradImpl<Avx512, Winograd<2>>::kernel(),
                                WinogradImpl<Avx512, Winograd<4>>::kernel(),
                                FreshWinogradImpl<Avx512, Winograd<2>>::kernel(),
                                FreshWinogradImpl<Avx512, Winograd<4>>::kernel(),
                                PooledImpl<Avx512>::kernel(),
                                EpilogueImpl<Avx512::kLanes>::kernel(),
                                ChecksumImpl<Avx512::kLanes>::run};
}  // namespace fused_resnet::cpu
  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
