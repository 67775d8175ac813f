// The epilogue as a pass of its own, y = act(scale * y + shift + residual), for convolutions that come from
// elsewhere. Plain structs and raw pointers, no Torch header.
#pragma once

#include <cstdint>

#include "activation.h"

namespace fused_resnet::cpu {

enum class Scalar : int { kFloat, kBFloat16, kHalf };

struct EpilogueProblem {
  void* y;               // read and written
  const void* residual;  // laid out as y and of its type, or nullptr
  const float* scale;    // one value per channel
  const float* shift;
  Scalar scalar;
  Activation activation;
  bool channels_last;  // rows are pixels and hold one value per channel; else rows are planes of one channel
  int64_t channels;
  int64_t row_length;  // channels, or pixels in a plane
};

struct EpilogueKernel {
  void (*run)(const EpilogueProblem& problem, int64_t first_row, int64_t last_row);
};

}  // namespace fused_resnet::cpu
