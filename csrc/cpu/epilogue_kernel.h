// The epilogue pass for one instruction set.
#pragma once

#include "activate.h"
#include "epilogue.h"
#include "scalars.h"

namespace fused_resnet::cpu {

template <int kLanes>
struct EpilogueImpl {
  using V = Vec<kLanes>;

  // One vector, or with kWhole = false its first `count` lanes, through a buffer.
  template <Activation kActivation, bool kResidual, bool kWhole, class T>
  static FR_INLINE void finish(T* y, const T* residual, V scale, V shift, int64_t count) {
    T y_buffer[kLanes], residual_buffer[kLanes];
    T* at = y;
    if constexpr (!kWhole) {
      std::memset(y_buffer, 0, sizeof(y_buffer));
      std::memcpy(y_buffer, y, count * sizeof(T));
      at = y_buffer;
      if constexpr (kResidual) {
        std::memset(residual_buffer, 0, sizeof(residual_buffer));
        std::memcpy(residual_buffer, residual, count * sizeof(T));
        residual = residual_buffer;
      }
    }
    V value = load<kLanes>(at) * scale + shift;
    if constexpr (kResidual) value += load<kLanes>(residual);
    store<kLanes>(at, activate<kActivation>(value));
    if constexpr (!kWhole) std::memcpy(y, y_buffer, count * sizeof(T));
  }

  template <Activation kActivation, bool kResidual, class T>
  static void rows(const EpilogueProblem& problem, int64_t first_row, int64_t last_row) {
    const int64_t length = problem.row_length, whole = length / kLanes * kLanes;
    for (int64_t row = first_row; row < last_row; ++row) {
      T* y = static_cast<T*>(problem.y) + row * length;
      const T* residual = kResidual ? static_cast<const T*>(problem.residual) + row * length : nullptr;
      const int64_t channel = problem.channels_last ? 0 : row % problem.channels;
      V scale = V{} + problem.scale[channel], shift = V{} + problem.shift[channel];
      for (int64_t i = 0; i < whole; i += kLanes) {
        if (problem.channels_last) {
          scale = load<kLanes>(problem.scale + i);
          shift = load<kLanes>(problem.shift + i);
        }
        finish<kActivation, kResidual, true>(y + i, residual + (kResidual ? i : 0), scale, shift, kLanes);
      }
      if (const int64_t rest = length - whole; rest > 0) {
        if (problem.channels_last) {
          scale = load_partial<kLanes>(problem.scale + whole, rest);
          shift = load_partial<kLanes>(problem.shift + whole, rest);
        }
        finish<kActivation, kResidual, false>(y + whole, residual + (kResidual ? whole : 0), scale, shift,
                                              rest);
      }
    }
  }

  using Function = void (*)(const EpilogueProblem&, int64_t, int64_t);

  template <Activation kActivation, bool kResidual>
  static Function by_scalar(Scalar scalar) {
    switch (scalar) {
      case Scalar::kBFloat16:
        return &rows<kActivation, kResidual, BFloat16>;
      case Scalar::kHalf:
        return &rows<kActivation, kResidual, Half>;
      default:
        return &rows<kActivation, kResidual, float>;
    }
  }

  template <bool kResidual>
  static Function by_activation(const EpilogueProblem& problem) {
    switch (problem.activation) {
      case Activation::kRelu:
        return by_scalar<Activation::kRelu, kResidual>(problem.scalar);
      case Activation::kRelu6:
        return by_scalar<Activation::kRelu6, kResidual>(problem.scalar);
      default:
        return by_scalar<Activation::kNone, kResidual>(problem.scalar);
    }
  }

  static void run(const EpilogueProblem& problem, int64_t first_row, int64_t last_row) {
    const Function function = problem.residual ? by_activation<true>(problem) : by_activation<false>(problem);
    function(problem, first_row, last_row);
  }

  static constexpr EpilogueKernel kernel() { return {&run}; }
};

}  // namespace fused_resnet::cpu
