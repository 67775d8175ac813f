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

}  // namespace fused_resnet::cpu
