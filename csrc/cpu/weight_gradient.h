// The gradient of a 3 x 3 filter (stride 1, dilation 1, one group) by Winograd, free of Torch: one text
// (weight_gradient_kernel.h), one instance per instruction set. float32, channels innermost.
#pragma once

#include <cstdint>

#include "conv.h"

namespace fused_resnet::cpu {

struct WeightGradientProblem {
  ConvShape shape;  // of the forward convolution
  const float* x;
  int64_t x_stride[3];  // n, h, w
  const float* grad_y;
  int64_t grad_y_stride[3];  // n, p, q
};

// How the work is cut: splits * k_blocks * c_blocks independent pieces, each a block of the filter's K x C
// and a range of the tiles of the images. Splits are summed afterwards.
struct WeightGradientPlan {
  int64_t tiles, tiles_per_split, splits;
  int64_t tiles_per_step;  // transformed at a time, so that they stay in the second-level cache
  int64_t k_block, k_blocks, c_block, c_blocks;
  int64_t scratch_floats;  // per thread

  int64_t pieces() const { return splits * k_blocks * c_blocks; }
};

struct WeightGradientKernel {
  WeightGradientPlan (*plan)(const ConvShape& shape, int threads);
  // Writes the piece's part of d_weight[split], which is [splits][K][3][3][C].
  void (*run_piece)(const WeightGradientProblem& problem, const WeightGradientPlan& plan, int64_t piece,
                    float* d_weight, float* scratch);
};

// One instruction set's, by the tile of the forward pass whose transpose they are.
struct WeightGradientKernels {
  WeightGradientKernel f2, f4;
};

#if defined(__x86_64__)
extern const WeightGradientKernels kWeightGradientAvx512, kWeightGradientAvx2;
#endif
extern const WeightGradientKernels kWeightGradientPortable;

}  // namespace fused_resnet::cpu
