// The fused convolution as the rest of the extension sees it: plain structs and raw pointers, no Torch
// header. Activations in float32 or bfloat16, NHWC, one group. These kernels share this interface: direct
// (any filter, stride and dilation), and Winograd F(2x2, 3x3) and F(4x4, 3x3) (3 x 3, stride 1, dilation 1),
// with weights as kernel_choice.h lists them.
#pragma once

#include <cstdint>

#include "activation.h"

namespace fused_resnet::cpu {

// Sizes in the letters of cuDNN.
struct ConvShape {
  int64_t n, h, w, c;  // input
  int64_t k, r, s;     // filter
  int64_t p, q;        // output
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// y = act(scale * conv(x, w) + shift + residual). Strides are in elements; channels are contiguous.
// x and residual may be the same memory, and a stride may be 0; y overlaps neither.
//
// The activations are of the kernel's own type, float or BFloat16: input<T>() and so on.
struct ConvProblem {
  ConvShape shape;
  const void* x;
  int64_t x_stride[3];   // n, h, w
  const float* weights;  // as pack_weights wrote them
  const float* scale;    // K floats each, readable (whatever they hold) up to the next multiple of 32
  const float* shift;
  const void* residual;        // or nullptr
  int64_t residual_stride[3];  // n, p, q
  void* y;
  int64_t y_stride[3];  // n, p, q
  Activation activation;

  template <class T>
  const T* input() const {
    return static_cast<const T*>(x);
  }
  template <class T>
  const T* added() const {
    return static_cast<const T*>(residual);
  }
  template <class T>
  T* output() const {
    return static_cast<T*>(y);
  }
};

// How the work is cut: row_blocks * k_blocks independent pieces, each a block of rows and a range of panels.
// A row of the GEMMs is an output pixel (direct) or a tile of them (Winograd), a panel as many output
// channels as the micro-kernel makes at once.
struct ConvPlan {
  int64_t rows, rows_per_block, row_blocks;
  int64_t panels, panels_per_block, k_blocks;
  int64_t scratch_floats;  // per thread
};

// One algorithm for one instruction set.
struct ConvKernel {
  int panel;
  int64_t (*weight_floats)(const ConvShape& shape);
  // Panels [first, last) of the output channels of an any-strided weight [K, C, R, S].
  void (*pack_weights)(const ConvShape& shape, const float* weight, const int64_t stride[4],
                       int64_t first_panel, int64_t last_panel, float* packed);
  ConvPlan (*plan)(const ConvShape& shape, int threads);
  void (*run_piece)(const ConvProblem& problem, const ConvPlan& plan, int64_t piece, float* scratch);
};

// A max pool after the convolution: p x q windows, padded with minus infinity.
struct Pool {
  int64_t window_h, window_w, stride_h, stride_w, pad_h, pad_w, p, q;
};
constexpr int64_t kMaxWindow = 8;  // rows of a window

// Convolution, epilogue and max pool in one pass.
struct PooledKernel {
  int panel;  // weights as in ConvKernel
  int64_t (*weight_floats)(const ConvShape& shape);
  void (*pack_weights)(const ConvShape& shape, const float* weight, const int64_t stride[4],
                       int64_t first_panel, int64_t last_panel, float* packed);
  // Whether it has this convolution. All but the direct kernel's want x dense from pixel to pixel.
  bool (*can_run)(const ConvShape& shape);
  int64_t (*scratch_floats)(const ConvShape& shape, const Pool& pool);
  // Rows [first, last) of windows of one image; problem.y is the pooled output, dense.
  void (*run)(const ConvProblem& problem, const Pool& pool, int64_t image, int64_t first, int64_t last,
              float* scratch);
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The cut of `rows` x `panels` into blocks of about best_rows rows (at most one and a half times as many, or
// `threads` times where the weights do not stay in a core's cache).
ConvPlan cut(int64_t rows, int64_t best_rows, int64_t panels, int threads, bool weights_stay);

}  // namespace fused_resnet::cpu
