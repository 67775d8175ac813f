// From here on the compiler makes code for AVX-512.
// To be included first by a file that has nothing else than kernels (isa_avx512_*.cpp).
#pragma once

#if defined(__x86_64__)
  // Standard headers first: what they define is shared with code for older CPUs.
  #include <immintrin.h>

  #include <algorithm>
  #include <array>
  #include <cstdint>
  #include <cstring>
  #include <type_traits>
  #include <utility>

  #include "isa.h"
  #if defined(__clang__)
    #pragma clang attribute push( \
        __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
    #define FR_TARGET_PUSHED
  #else
    #pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
  #endif
  #define FR_ISA Avx512
  #define FR_BLOCK RegisterBlock<16, 14, 2>
#endif
