// Loading and storing the 16-bit floating-point types as vectors of float. Stores round to nearest even.
#pragma once

#include "vec.h"

namespace fused_resnet::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <int kLanes>
struct IntVecTypes {
  typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
  typedef uint16_t U16Unaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
};

template <int kLanes>
FR_INLINE Vec<kLanes> load(const BFloat16* p) {
#if defined(FR_TARGET_AVX512_BF16)
  // GCC widens in halves and puts them together: five instructions for two.
  if constexpr (kLanes == 16) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec<kLanes>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(pairs), 16);
  }
#endif
  using Types = IntVecTypes<kLanes>;
  const typename Types::U16 bits = *reinterpret_cast<const typename Types::U16Unaligned*>(p);
  return (Vec<kLanes>)(__builtin_convertvector(bits, typename Types::U32) << 16);
}

template <int kLanes>
FR_INLINE void store(BFloat16* p, Vec<kLanes> v) {
#if defined(FR_TARGET_AVX512_BF16)
  // A subnormal becomes 0, which its own kernels take it for anyway.
  if constexpr (kLanes == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
    return;
  }
#endif
  using Types = IntVecTypes<kLanes>;
  using U32 = typename Types::U32;
  const U32 bits = (U32)v;
  const U32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  // Rounding could carry a NaN into infinity or zero: make it the quiet NaN instead.
  const U32 result = v != v ? (bits >> 16) | 0x40 : rounded >> 16;
  *reinterpret_cast<typename Types::U16Unaligned*>(p) = __builtin_convertvector(result, typename Types::U16);
}

// One value in the type of a weight's copy.
template <class T>
FR_INLINE T rounded(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    T result;
    store<1>(&result, Vec<1>{value});
    return result;
  }
}

// float16 where the instruction set has no conversion. The multiplication by 2^112 moves the exponent from
// float16's range to float32's and normalises subnormals on the way.
template <int kLanes>
FR_INLINE float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7fff) << 13;
  float value;
  uint32_t result;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  std::memcpy(&result, &value, 4);
  if ((bits & 0x7c00) == 0x7c00) result = magnitude | 0x7f800000;  // infinity and NaN
  result |= sign;
  std::memcpy(&value, &result, 4);
  return value;
}

template <int kLanes>
FR_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x47800000) return sign | 0x7c00;  // 2^16 and more, infinity
  if (bits < 0x38800000) {
    // Below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the last bits, rounded by the addition.
    float shifted;
    std::memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  const uint32_t rounded = bits + 0xfff + ((bits >> 13) & 1);
  return sign | uint16_t((rounded - 0x38000000) >> 13);  // a carry past 65504 gives infinity, as it should
}

template <int kLanes>
FR_INLINE Vec<kLanes> load(const Half* p) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    return (Vec<kLanes>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
#endif
#if defined(__F16C__)
  if constexpr (kLanes == 8) {
    return (Vec<kLanes>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
#endif
  Vec<kLanes> v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float<kLanes>(p[i].bits);
  return v;
}

template <int kLanes>
FR_INLINE void store(Half* p, Vec<kLanes> v) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (kLanes == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half<kLanes>(v[i]);
}

// The first `count` lanes of a 16-bit type, as for float in vec.h.
template <int kLanes, class T, class = std::enable_if_t<sizeof(T) == 2>>
FR_INLINE Vec<kLanes> load_partial(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load<kLanes>(buffer);
}

template <int kLanes, class T, class = std::enable_if_t<sizeof(T) == 2>>
FR_INLINE void store_partial(T* p, Vec<kLanes> v, int64_t count) {
  T buffer[kLanes];
  store<kLanes>(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace fused_resnet::cpu
