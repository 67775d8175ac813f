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
    #pragma clang attribute push(                                                                      \
        __attribute__((                                                                                \
            target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"))), \
        apply_to = function)
  #else
    #pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
  #endif
  #if defined(__GNUC__) && !defined(__clang__)
    #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own "undefined" vectors
  #endif
  #define FR_TARGET_AMX  // GCC defines no macros for its pragma
  #include "pooled_kernel.h"
  #include "split_kernel.h"
  #include "split_rows.h"
  #include "winograd_split.h"

namespace fused_resnet::cpu {
Kernels kernels_amx() {
  Kernels set = kKernelsAvx512;
  set.isa = "amx";
  set.split_direct = SplitImpl<AmxTiles, 16, false>::kernel();
  set.fresh_split_direct = SplitImpl<AmxTiles, 16, true>::kernel();
  set.split_winograd2 = SplitWinogradImpl<AmxTiles, 16, Winograd<2>>::kernel();
  set.split_winograd4 = SplitWinogradImpl<AmxTiles, 16, Winograd<4>>::kernel();
  set.split_pooled = PooledRows<SplitRows<AmxTiles, 16>>::kernel();
  return set;
}
}  // namespace fused_resnet::cpu
  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
