// What one launch of a training pass needs to know: plain data, the kernel's only parameter. No Torch, no
// CUDA.
//
// Activations are dense [N, H, W, C]: `rows` pixels of `channels`, or `elements` numbers in a line. Vectors
// are fp32, one number per channel. The mask has one bit per element, bit i % 32 of word i / 32.
#pragma once

#include <cstdint>

#include "conv_params.h"

namespace fused_resnet {

// One BN whose statistics are known: weight * (y - mean) * invstd + bias.
struct BnBranch {
  const void* y;
  const float* mean;
  const float* invstd;
  const float* weight;   // null: 1
  const float* bias;     // null: 0
  const float* mean_dz;  // backward apply: means over N, H, W of dz and of dz * xhat
  const float* mean_dz_xhat;
  int32_t dtype;  // of y
  int32_t reserved;
};

struct BnParams {
  BnBranch branch[2];    // [1] is the projection's, used where branches == 2
  const void* residual;  // apply; null where there is none
  const void* grad_out;  // backward
  void* out;             // apply: the activation; backward apply: d_y
  void* d_second;        // backward apply: of the residual or of the projection's y; null: not wanted
  uint32_t* mask;        // null: none; written by apply, read by the backward passes
  float* result[3];      // stats: mean, var; backward reduce: sum dz, sum dz * xhat, the projection's
  void* workspace;  // reductions: one uint32_t counter per column (zero before and after each launch), then
                    // the partial results
  int64_t partials_offset;  // bytes from workspace to them, in the same allocation or another
  int64_t elements, rows;
  int64_t rows_per_part;  // reductions: a block takes so many rows of one column
  int64_t stride;         // elementwise: packets from one of a thread's to its next
  int32_t channels;
  int32_t parts, lanes;  // reductions: blocks that share a column; packets of one row in a column
  int32_t branches;      // 1 or 2
  int32_t activation;
  int32_t out_dtype;     // of the activation, so of grad_out as well
  int32_t second_dtype;  // of the residual, so of its gradient
  int32_t reserved;
};

static_assert(sizeof(BnBranch) == 64 && sizeof(BnParams) == 2 * 64 + 8 * 8 + 6 * 8 + 8 * 4,
              "no padding: plans are compared byte by byte");

}  // namespace fused_resnet
