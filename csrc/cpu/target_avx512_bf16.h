// From here on the compiler makes code for AVX-512 with products of bfloat16 pairs.
// To be included first by a file that has nothing else than kernels (isa_avx512_bf16_*.cpp).
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
    #pragma clang attribute push(                                                               \
        __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
        apply_to = function)
    #define FR_TARGET_PUSHED
  #else
    #pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
  #endif
  #if defined(__GNUC__) && !defined(__clang__)
    #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own "undefined" vectors
  #endif
  #define FR_TARGET_AVX512_BF16  // GCC defines no macros for its pragma
  #define FR_ISA Avx512Bf16
  #define FR_BF16_BLOCK Bf16Block<16, 14, 2>
  #define FR_BF16_WINOGRAD_BLOCK RegisterBlock<16, 14, 2, BFloat16>
#endif
