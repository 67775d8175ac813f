// The Winograd convolution as the rest of the extension sees it: plain structs and raw pointers, no Torch
// header. fp32, NHWC, stride 1, dilation 1, groups 1, filter 3 x 3; any C, K, H, W and padding.
#pragma once

#include <cstdint>

#include "activation.h"

namespace fused_resnet::cpu {

// y = act(scale * conv(x, w) + shift + residual). Strides are in elements, channels are contiguous (stride
// 1). x and residual may be the same memory, and a stride may be 0; y overlaps neither.
struct WinogradProblem {
  int64_t n, h, w, c;  // input
  int64_t k, p, q;     // output
  int64_t pad_h, pad_w;
  const float* x;
  int64_t x_stride[3];   // n, h, w
  const float* weights;  // as winograd_transform_weights wrote them
  const float* scale;    // K floats each, readable (whatever they hold) up to the next multiple of 32
  const float* shift;
  const float* residual;       // or nullptr
  int64_t residual_stride[3];  // n, p, q
  float* y;
  int64_t y_stride[3];  // n, p, q
  Activation activation;
};

// How the work is cut: tile_blocks * k_blocks independent pieces, each a block of tiles and a range of panels
// (a panel is as many output channels as the micro-kernel makes at once).
struct WinogradPlan {
  int64_t tiles, tiles_per_block, tile_blocks;
  int64_t panels, panels_per_block, k_blocks;
  int64_t scratch_floats;  // per thread
};

// One instruction set's kernel for F(m x m, 3 x 3).
struct WinogradKernel {
  int m, panel;
  int64_t (*weight_floats)(int64_t c, int64_t k);
  // Panels [first, last) of the output channels of an any-strided weight [K, C, 3, 3].
  void (*transform_weights)(const float* weight, const int64_t stride[4], int64_t c, int64_t k,
                            int64_t first_panel, int64_t last_panel, float* packed);
  WinogradPlan (*plan)(const WinogradProblem& problem, int threads);
  void (*run_piece)(const WinogradProblem& problem, const WinogradPlan& plan, int64_t piece, float* scratch);
};

}  // namespace fused_resnet::cpu
