// Loading and storing activations as float vectors, and the 1-bit mask. Templates over the lanes, as vec.h
// asks.
#pragma once

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#include "training.h"
#include "vec.h"

namespace fused_resnet::cpu {

template <int kLanes>
struct IntVecTypes {
  typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
  typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t U16 __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
};

// The memory type of an element, and its conversion.
template <Element kElement>
struct Memory;

template <>
struct Memory<Element::kFloat32> {
  using Type = float;
  template <int kLanes>
  static FR_INLINE Vec<kLanes> load(const Type* p) {
    return fused_resnet::cpu::load<kLanes>(p);
  }
  template <int kLanes>
  static FR_INLINE void store(Type* p, Vec<kLanes> v) {
    fused_resnet::cpu::store<kLanes>(p, v);
  }
};

template <>
struct Memory<Element::kBfloat16> {
  using Type = uint16_t;
  template <int kLanes>
  static FR_INLINE Vec<kLanes> load(const Type* p) {
    using U32 = typename IntVecTypes<kLanes>::U32;
    const auto half = *reinterpret_cast<const typename IntVecTypes<kLanes>::U16*>(p);
    return reinterpret_cast<Vec<kLanes>>(__builtin_convertvector(half, U32) << 16);
  }
  // Round to nearest, ties to even; a NaN becomes the quiet NaN.
  template <int kLanes>
  static FR_INLINE void store(Type* p, Vec<kLanes> v) {
    using Types = IntVecTypes<kLanes>;
    using U32 = typename Types::U32;
    const U32 bits = reinterpret_cast<U32>(v);
    const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32 quiet_nan = U32{} + 0x7fc0u;
    const U32 chosen = v != v ? quiet_nan : rounded;
    *reinterpret_cast<typename Types::U16*>(p) = __builtin_convertvector(chosen, typename Types::U16);
  }
};

// Lane l becomes all ones where bit l of `bits` is set.
template <int kLanes>
FR_INLINE typename IntVecTypes<kLanes>::I32 lanes_of_bits(uint32_t bits) {
  using U32 = typename IntVecTypes<kLanes>::U32;
  U32 lane_bit = {};
  for (int l = 0; l < kLanes; ++l) lane_bit[l] = 1u << l;
  return ((U32{} + bits) & lane_bit) != U32{};
}

// Bit l is set where lane l is all ones.
template <int kLanes>
FR_INLINE uint32_t bits_of_lanes(typename IntVecTypes<kLanes>::I32 lanes) {
#if defined(__AVX512DQ__)
  if constexpr (kLanes == 16) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
#endif
#if defined(__SSE2__)
  if constexpr (kLanes == 4) return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(lanes)));
#endif
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= (static_cast<uint32_t>(lanes[l]) & 1u) << l;
  return bits;
}

}  // namespace fused_resnet::cpu
