// The 1-bit mask in vector registers. Templates over the lanes, as vec.h asks.
#pragma once

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#include "scalars.h"
#include "vec.h"

namespace fused_resnet::cpu {

template <int kLanes>
struct LaneMask {
  typedef int32_t Type __attribute__((vector_size(kLanes * 4)));
};

// Lane l becomes all ones where bit l of `bits` is set.
template <int kLanes>
FR_INLINE typename LaneMask<kLanes>::Type lanes_of_bits(uint32_t bits) {
  using U32 = typename IntVecTypes<kLanes>::U32;
  U32 lane_bit = {};
  for (int l = 0; l < kLanes; ++l) lane_bit[l] = 1u << l;
  return ((U32{} + bits) & lane_bit) != U32{};
}

// Bit l is set where lane l is all ones.
template <int kLanes>
FR_INLINE uint32_t bits_of_lanes(typename LaneMask<kLanes>::Type lanes) {
#if defined(__AVX512DQ__)
  if constexpr (kLanes == 16) return _mm512_movepi32_mask((__m512i)lanes);
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
#endif
#if defined(__SSE2__)
  if constexpr (kLanes == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes));
#endif
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= (static_cast<uint32_t>(lanes[l]) & 1u) << l;
  return bits;
}

}  // namespace fused_resnet::cpu
