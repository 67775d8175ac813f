// What every operator of the CPU extension needs from its tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "activation.h"

namespace fused_resnet::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// BN in evaluation mode and the convolution's bias, as they come from Python.
struct BatchNormArguments {
  const OptionalTensor& bias;
  const OptionalTensor& weight;
  const OptionalTensor& beta;
  const OptionalTensor& mean;
  const OptionalTensor& var;
  double eps;
};

// scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale, in float32. Both vectors hold K
// values and, behind them, zeros up to the next multiple of 32.
class ScaleShift {
 public:
  ScaleShift(const BatchNormArguments& bn, int64_t k);
  const float* scale() const { return memory_.get(); }
  const float* shift() const { return memory_.get() + padded_; }

 private:
  int64_t padded_;
  std::unique_ptr<float[]> memory_;  // one piece for both: a convolution at batch 1 notices six allocations
};

Activation activation_from(int64_t code);  // 0 none, 1 relu, 2 relu6

// [N, C, H, W] with channels innermost and no gaps: what torch calls channels_last.
bool is_channels_last(const Tensor& t);
std::string shape_of(const Tensor& t);  // "[2, 64, 56, 56]"

}  // namespace fused_resnet::cpu
