// From here on the compiler makes code for AVX2.
// To be included first by a file that has nothing else than kernels (isa_avx2_*.cpp).
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
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
    #define FR_TARGET_PUSHED
  #else
    #pragma GCC target("avx2,fma,f16c")
  #endif
  #define FR_ISA Avx2
  #define FR_BLOCK RegisterBlock<8, 6, 2>
#endif
