// What one launch of the fused tail needs to know: plain data, the kernel's only parameter. No Torch, no
// CUDA.
//
// Letters as in cuDNN: x is [N, H, W, C], a filter [K, R, S, C], y and residual [N, P, Q, K]. As a matrix
// product the convolution has N*P*Q rows ("pixels"), K columns ("channels") and a depth of R*S*C, walked in
// steps of the tile's depth.
#pragma once

#include <cstdint>

namespace fused_resnet {

enum DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };
enum Activation : int32_t { kActivationNone = 0, kActivationRelu = 1, kActivationRelu6 = 2 };

// One convolution that is accumulated: the main one, or the 1x1 projection of the shortcut.
struct ConvSource {
  const void* x;                               // channels are contiguous; the other strides are below
  const void* weight;                          // dense [K, R, S, C]
  int64_t x_stride_n, x_stride_h, x_stride_w;  // in elements
  int32_t h, w, c, r, s;
  int32_t stride_h, stride_w;
  int32_t padding_h, padding_w;
  int32_t dilation_h, dilation_w;
  int32_t depth;  // r * s * c
  int32_t steps;  // depth in steps of the tile, rounded up
  int32_t step_r, step_s,
      step_c;  // one step as a number with the digits (r, s, c): what the load cursor adds
  int32_t
      vector_bytes;  // width of one load of x or weight: 16, 8, 4 or 2; both are aligned to it in every row
  int32_t reserved;
};

// scale[k] = weight / sqrt(var + eps), shift[k] = bias + (conv_bias - mean) * scale. BN is absent where mean
// is null (then scale = 1, shift = conv_bias or 0); weight and bias may be null on their own (BN without
// affine).
struct ChannelNorm {
  const void* weight;
  const void* bias;
  const void* mean;
  const void* var;
  const void* conv_bias;
  float eps;
  int32_t norm_dtype;  // DType of weight, bias, mean, var
  int32_t conv_bias_dtype;
  int32_t reserved;
};

struct ConvParams {
  ConvSource source[2];  // [1] is the projection, used where sources == 2
  ChannelNorm norm[2];
  const void* residual;  // null where there is none
  void* y;
  void* workspace;  // split-K: one uint32_t counter per tile (zero before and after each launch), then the
                    // partial sums; statistics: one counter per column of tiles and group of its tiles, then
                    // the partial results
  int64_t partials_offset;  // bytes from workspace to them, in the same allocation or another
  float* mean;              // statistics of y, [k]; null: none wanted
  float* var;
  int32_t pixels;  // N * P * Q
  int32_t p, q, k;
  int32_t sources;  // 1 or 2
  int32_t splits;   // blocks that share one tile's steps; gridDim.y
  int32_t tiles_n;  // tiles along K: blockIdx.x = tile_m * tiles_n + tile_n
  int32_t activation;
  int32_t residual_dtype;
  int32_t y_dtype;
  int32_t y_vector;  // elements of y and residual moved at once: 16 / size of the wider one, or 1 where K or
                     // a pointer is not aligned
  int32_t reserved;
};

static_assert(sizeof(void*) == 8, "the argument bytes are written for 64-bit devices");
static_assert(sizeof(ConvSource) == 112 && sizeof(ChannelNorm) == 56,
              "no padding: plans are compared byte by byte");
static_assert(sizeof(ConvParams) == 2 * 112 + 2 * 56 + 6 * 8 + 12 * 4,
              "no padding: plans are compared byte by byte");

}  // namespace fused_resnet
