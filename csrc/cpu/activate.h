// The activations on vectors. Written so that NaN passes through, as in eager PyTorch (and not in oneDNN,
// whose ReLU turns NaN into 0): a comparison with NaN is false.
#pragma once

#include "activation.h"
#include "vec.h"

namespace fused_resnet::cpu {

template <Activation kActivation, class V>
FR_INLINE V activate(V v) {
  if constexpr (kActivation != Activation::kNone) {
    const V zero = {};
    v = v < zero ? zero : v;
  }
  if constexpr (kActivation == Activation::kRelu6) {
    const V six = V{} + 6.0f;
    v = v > six ? six : v;
  }
  return v;
}

// The activation as two bounds, so that it needs no code of its own in each kernel. Comparisons with NaN are
// false. What equals the lower bound becomes it: after a ReLU there is no -0.
struct OutputBounds {
  float lower, upper;
  FR_INLINE explicit OutputBounds(Activation activation)
      : lower(activation == Activation::kNone ? -__builtin_inff() : 0.0f),
        upper(activation == Activation::kRelu6 ? 6.0f : __builtin_inff()) {}
  // Never -0 where there is an activation.
  template <int kLanes>
  FR_INLINE Vec<kLanes> apply(Vec<kLanes> value) const {
    const Vec<kLanes> low = Vec<kLanes>{} + lower, high = Vec<kLanes>{} + upper;
    value = value <= low ? low : value;
    return value > high ? high : value;
  }
};

}  // namespace fused_resnet::cpu
