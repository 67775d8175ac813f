// The register block of bfloat16: a word of V and U is a pair of neighbours in depth, whose products are both
// added to float32 sums. Twice as many multiply-adds for each instruction as with float32.
#pragma once

#include "gemm.h"
#include "scalars.h"

namespace fused_resnet::cpu {

template <int kLanes_, int kRows_, int kCols_>
struct Bf16Block : RegisterBlock<kLanes_, kRows_, kCols_, BFloat16> {
  static constexpr int kLanes = kLanes_;
  // One sum: its rounding error is far below that of a bfloat16 output.
  static constexpr int64_t kSegment = int64_t{1} << 40;

  static FR_INLINE void multiply_add(Vec<kLanes>& sum, float value, Vec<kLanes> weight) {
#if defined(FR_TARGET_AVX512_BF16)
    if constexpr (kLanes == 16) {
      sum = (Vec<kLanes>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(value), (__m512bh)weight);
      return;
    }
#endif
    using U32 = typename IntVecTypes<kLanes>::U32;
    uint32_t pair;
    std::memcpy(&pair, &value, sizeof(pair));
    const U32 x = U32{} + pair, w = (U32)weight;
    sum += (Vec<kLanes>)(x & 0xffff0000u) * (Vec<kLanes>)(w & 0xffff0000u);
    sum += (Vec<kLanes>)(x << 16) * (Vec<kLanes>)(w << 16);
  }
};

}  // namespace fused_resnet::cpu
