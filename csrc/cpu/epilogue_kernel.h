// The epilogue pass for one instruction set.
#pragma once

#include "epilogue.h"
#include "finish.h"

namespace fused_resnet::cpu {

template <int kLanes>
struct EpilogueImpl {
  using V = Vec<kLanes>;

  template <class S, class T>
  static void rows(const EpilogueProblem& problem, int64_t first_row, int64_t last_row) {
    constexpr bool kResidual = S::kResidual == Residual::kSome;
    const Bounds bounds(problem.activation);
    const int64_t length = problem.row_length, whole = length / kLanes * kLanes;
    for (int64_t row = first_row; row < last_row; ++row) {
      T* y = static_cast<T*>(problem.y) + row * length;
      const T* residual = kResidual ? static_cast<const T*>(problem.residual) + row * length : nullptr;
      const int64_t channel = problem.channels_last ? 0 : row % problem.channels;
      V scale = broadcast<kLanes>(problem.scale[channel]), shift = broadcast<kLanes>(problem.shift[channel]);
      for (int64_t i = 0; i < whole; i += kLanes) {
        if (problem.channels_last) {
          scale = load<kLanes>(problem.scale + i);
          shift = load<kLanes>(problem.shift + i);
        }
        finish<S, kLanes, Lanes::kAll>(load<kLanes>(y + i), scale, shift, bounds,
                                       residual + (kResidual ? i : 0), y + i, kLanes);
      }
      if (const int64_t rest = length - whole; rest > 0) {
        if (problem.channels_last) {
          scale = load_partial<kLanes>(problem.scale + whole, rest);
          shift = load_partial<kLanes>(problem.shift + whole, rest);
        }
        finish<S, kLanes, Lanes::kFewer>(load_partial<kLanes>(y + whole, rest), scale, shift, bounds,
                                         residual + (kResidual ? whole : 0), y + whole, rest);
      }
    }
  }

  static void run(const EpilogueProblem& problem, int64_t first_row, int64_t last_row) {
    with_steps(problem.activation, problem.residual != nullptr, [&](auto steps) {
      using S = decltype(steps);
      switch (problem.scalar) {
        case Scalar::kBFloat16:
          return rows<S, BFloat16>(problem, first_row, last_row);
        case Scalar::kHalf:
          return rows<S, Half>(problem, first_row, last_row);
        case Scalar::kFloat:
          return rows<S, float>(problem, first_row, last_row);
      }
    });
  }

  static constexpr EpilogueKernel kernel() { return {&run}; }
};

}  // namespace fused_resnet::cpu
