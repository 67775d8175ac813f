// The end of a convolution on matrix tiles, row by row, while the tiles make the next sums.
#pragma once

#include "conv.h"
#include "finish.h"
#include "gemm.h"

namespace fused_resnet::cpu {

// Sums of a group that wait to be finished: scale, shift, residual, activation, store.
template <int kLanes>
struct Bf16x3Pending {
  const ConvProblem* problem;
  Bounds bounds;
  const float* sums;  // [kGroup][sums_stride], nullptr: nothing to do
  int64_t sums_stride;
  const int64_t* outputs;  // of the group's positions in y and in the residual; -1: thrown away
  int64_t k_begin, k_end;

  FR_INLINE void finish(int64_t begin, int64_t end) const {
    if (sums == nullptr) return;
    for (int64_t row = begin; row < end; ++row) {
      if (outputs[row] < 0) continue;
      const float* sum = sums + row * sums_stride - k_begin;
      int64_t k = k_begin;
      for (; k + kLanes <= k_end; k += kLanes)
        finish_vector<Lanes::kAll>(sum + k, outputs[row] + k, k, kLanes);
      if (k < k_end) finish_vector<Lanes::kFewer>(sum + k, outputs[row] + k, k, k_end - k);
    }
  }
  template <Lanes kWhich>
  FR_INLINE void finish_vector(const float* sum, int64_t at, int64_t k, int64_t count) const {
    const float* residual = problem->added<float>();
    cpu::finish<AllSteps<Residual::kUnlessNull>, kLanes, kWhich>(
        load<kLanes>(sum), load<kLanes>(problem->scale + k), load<kLanes>(problem->shift + k), bounds,
        residual == nullptr ? nullptr : residual + at, problem->output<float>() + at, count);
  }
  // What finish will need.
  FR_INLINE void fetch(int64_t begin, int64_t end) const {
    if (sums == nullptr) return;
    for (int64_t row = begin; row < end; ++row) {
      if (outputs[row] < 0) continue;
      for (int64_t k = k_begin; k < k_end; k += kCacheLine) {
        __builtin_prefetch(problem->output<float>() + outputs[row] + k, 1);
        if (problem->residual) __builtin_prefetch(problem->added<float>() + outputs[row] + k);
      }
    }
  }
};

}  // namespace fused_resnet::cpu
