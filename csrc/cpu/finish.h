// The end of every fused convolution kernel: scale, shift, residual, activation and store, for one vector of
// output channels of one pixel.
#pragma once

#include "activate.h"
#include "conv.h"

namespace fused_resnet::cpu {

// Which epilogue a kernel is compiled with.
template <Activation kActivation_, bool kResidual_>
struct Epilogue {
  static constexpr Activation kActivation = kActivation_;
  static constexpr bool kResidual = kResidual_;
};

// body(Epilogue<...>{}) for the epilogue of `problem`.
template <class Body>
FR_INLINE void with_epilogue(const ConvProblem& problem, Body&& body) {
  const bool residual = problem.residual != nullptr;
  switch (problem.activation) {
    case Activation::kRelu:
      return residual ? body(Epilogue<Activation::kRelu, true>{})
                      : body(Epilogue<Activation::kRelu, false>{});
    case Activation::kRelu6:
      return residual ? body(Epilogue<Activation::kRelu6, true>{})
                      : body(Epilogue<Activation::kRelu6, false>{});
    case Activation::kNone:
      return residual ? body(Epilogue<Activation::kNone, true>{})
                      : body(Epilogue<Activation::kNone, false>{});
  }
}

// kWhole: the vector is full, else it holds `count` channels.
template <class E, int kLanes, bool kWhole>
FR_INLINE void finish(Vec<kLanes> value, Vec<kLanes> scale, Vec<kLanes> shift, const float* residual,
                      float* y, int64_t count) {
  value = value * scale + shift;
  if constexpr (E::kResidual)
    value += kWhole ? load<kLanes>(residual) : load_partial<kLanes>(residual, count);
  value = activate<E::kActivation>(value);
  if constexpr (kWhole) {
    store<kLanes>(y, value);
  } else {
    store_partial<kLanes>(y, value, count);
  }
}

}  // namespace fused_resnet::cpu
