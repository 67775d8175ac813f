// The vector type the CPU kernels are written in: the compilers' own vector extension, so one text serves
// AVX-512, AVX2, NEON and SSE2, and operators mean what they say. Every function is a template over the
// number of lanes, hence over the instruction set: no symbol is shared between translation units that are
// compiled for different instruction sets (a linker keeps one copy of a shared one, whichever it is).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define FR_INLINE inline __attribute__((always_inline))
#define FR_NOINLINE __attribute__((noinline))
#define FR_LAMBDA __attribute__((always_inline))

namespace fused_resnet::cpu {

template <int kLanes>
struct VecTypes {
  typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
  // The same vector at any address that holds floats.
  typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
};

template <int kLanes>
using Vec = typename VecTypes<kLanes>::Vec;

// Not 0 + x, which is another number where x is -0: compilers would have to add.
template <int kLanes>
FR_INLINE Vec<kLanes> broadcast(float x) {
  return x - Vec<kLanes>{};
}

template <int kLanes>
FR_INLINE Vec<kLanes> load(const float* p) {
  return *reinterpret_cast<const typename VecTypes<kLanes>::Unaligned*>(p);
}

template <int kLanes>
FR_INLINE void store(float* p, Vec<kLanes> v) {
  *reinterpret_cast<typename VecTypes<kLanes>::Unaligned*>(p) = v;
}

// The first `count` lanes; the others are zero on load and untouched on store.
template <int kLanes>
FR_INLINE Vec<kLanes> load_partial(const float* p, int64_t count) {
  Vec<kLanes> v = {};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
  return v;
}

template <int kLanes>
FR_INLINE void store_partial(float* p, Vec<kLanes> v, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

// body(integral_constant 0), ..., body(integral_constant kCount - 1): a loop whose index is a constant
// expression, so that arrays indexed by it become registers.
template <class Body, int... kIndex>
FR_INLINE void unroll_indices(std::integer_sequence<int, kIndex...>, Body&& body) {
  (body(std::integral_constant<int, kIndex>{}), ...);
}

template <int kCount, class Body>
FR_INLINE void unroll(Body&& body) {
  unroll_indices(std::make_integer_sequence<int, kCount>{}, body);
}

}  // namespace fused_resnet::cpu
