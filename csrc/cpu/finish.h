// The end of every kernel: y = activation(scale * value + shift + residual), for one vector of channels (or
// of pixels of one channel). As in eager PyTorch NaN passes through, and so does -0, which is not below 0.
#pragma once

#include "activation.h"
#include "scalars.h"

namespace fused_resnet::cpu {

// A comparison with NaN is false. (oneDNN's ReLU turns NaN into 0.)
template <class V>
FR_INLINE V at_least(V v, V low) {
  return v < low ? low : v;
}
template <class V>
FR_INLINE V at_most(V v, V high) {
  return v > high ? high : v;
}

// The activation as two bounds, so that it needs no code of its own in each kernel.
struct Bounds {
  float lower, upper;
  float zero = -0.0f;  // added last: -0 changes nothing, +0 makes +0 of -0

  FR_INLINE explicit Bounds(Activation activation)
      : lower(activation == Activation::kNone ? -__builtin_inff() : 0.0f),
        upper(activation == Activation::kRelu6 ? 6.0f : __builtin_inff()) {}

  // For a max pool, which compares what an activation leaves as integers: -0 would be the largest of all.
  static FR_INLINE Bounds before_max_pool(Activation activation) {
    Bounds bounds(activation);
    if (activation != Activation::kNone) bounds.zero = 0.0f;
    return bounds;
  }
};

enum class Residual { kNone, kSome, kUnlessNull };

// The steps that a kernel is compiled with.
template <bool kLower_, bool kUpper_, bool kZero_, Residual kResidual_>
struct Steps {
  static constexpr bool kLower = kLower_, kUpper = kUpper_, kZero = kZero_;
  static constexpr Residual kResidual = kResidual_;
};
// All that Bounds says; with or without a residual.
template <Residual kResidual>
using AllSteps = Steps<true, true, true, kResidual>;

// body(Steps<...>{}) with no more steps than these need.
template <class Body>
FR_INLINE void with_steps(Activation activation, bool residual, Body&& body) {
  const auto with_residual = [&](auto some) FR_LAMBDA {
    constexpr Residual kResidual = decltype(some)::value ? Residual::kSome : Residual::kNone;
    switch (activation) {
      case Activation::kRelu:
        return body(Steps<true, false, false, kResidual>{});
      case Activation::kRelu6:
        return body(Steps<true, true, false, kResidual>{});
      case Activation::kNone:
        return body(Steps<false, false, false, kResidual>{});
    }
  };
  return residual ? with_residual(std::true_type{}) : with_residual(std::false_type{});
}

// Of a vector's lanes: all, fewer, or either, which `count` says.
enum class Lanes { kAll, kFewer, kEither };

template <class S, int kLanes, Lanes kWhich, class T>
FR_INLINE void finish(Vec<kLanes> value, Vec<kLanes> scale, Vec<kLanes> shift, Bounds bounds,
                      const T* residual, T* y, int64_t count) {
  const bool whole = kWhich == Lanes::kAll || (kWhich == Lanes::kEither && count >= kLanes);
  value = value * scale + shift;
  if (S::kResidual == Residual::kSome || (S::kResidual == Residual::kUnlessNull && residual != nullptr)) {
    value += whole ? load<kLanes>(residual) : load_partial<kLanes>(residual, count);
  }
  if constexpr (S::kLower) value = at_least(value, broadcast<kLanes>(bounds.lower));
  if constexpr (S::kUpper) value = at_most(value, broadcast<kLanes>(bounds.upper));
  if constexpr (S::kZero) value += broadcast<kLanes>(bounds.zero);
  if (whole) {
    store<kLanes>(y, value);
  } else {
    store_partial<kLanes>(y, value, count);
  }
}

}  // namespace fused_resnet::cpu
