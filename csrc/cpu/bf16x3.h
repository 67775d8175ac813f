// float32 products from bfloat16 multipliers. A float32 has 24 significant bits, a bfloat16 eight, so
//
//   x = x0 + x1 + x2,   x0 = bf16(x), x1 = bf16(x - x0), x2 = bf16(x - x0 - x1)
//
// loses nothing, and of the nine products of two such sums six make up x w: x1 w2, x2 w1 and x2 w2 are below
// 2^-25 of it, less than half a unit of float32's last place. Each product is exact in float32, where the
// sums are kept; a convolution so computed is as accurate as one by float32 multiply-adds.
//
// What differs from float32: an infinity becomes NaN (its rest is infinity - infinity), as does a finite
// value that rounds to infinity (above 3.39e38), and the matrix unit takes what lies below 2^-126 for zero,
// so that values below about 2^-108 keep fewer bits.
#pragma once

#include "scalars.h"

namespace fused_resnet::cpu {

constexpr int kParts = 3;

// The products of parts (of x, of w) in the order in which they are made; each step changes one operand.
struct PartsOfProduct {
  int x, w;
};
constexpr PartsOfProduct kProducts[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

// 2 kLanes consecutive values to 2 kLanes bfloat16 in each part, `part_stride` apart.
template <int kLanes>
FR_INLINE void store_bf16x3(Vec<kLanes> low, Vec<kLanes> high, BFloat16* to, int64_t part_stride) {
#if defined(FR_TARGET_AMX)
  if constexpr (kLanes == 16) {
    unroll<kParts>([&](auto part) FR_LAMBDA {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      _mm512_storeu_si512(to + part * part_stride, both);
      if constexpr (decltype(part)::value < kParts - 1) {
        low -= (Vec<kLanes>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
        high -= (Vec<kLanes>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
      }
    });
    return;
  }
#endif
  unroll<kParts>([&](auto part) FR_LAMBDA {
    BFloat16* at = to + part * part_stride;
    store<kLanes>(at, low);
    store<kLanes>(at + kLanes, high);
    low -= load<kLanes>(at);
    high -= load<kLanes>(at + kLanes);
  });
}

}  // namespace fused_resnet::cpu
