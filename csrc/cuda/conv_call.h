// One call of a convolution's operator: collects and checks its tensors, then plans and launches. Shared by
// the operators whose kernel is an implicit GEMM.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "plan.h"
#include "torch_device.h"

namespace fused_resnet {

using OptionalTensor = std::optional<torch::stable::Tensor>;

// The tensors and eps of one convolution with its BN.
struct ConvNorm {
  const torch::stable::Tensor& weight;
  const OptionalTensor &bias, &bn_weight, &bn_bias, &running_mean, &running_var;
  double eps;
  const char* prefix;  // of the names in messages
};

struct ConvShape {
  const std::vector<int64_t>&stride, &padding, &dilation;
  int64_t groups;
};

int32_t size32(int64_t size, const char* name);

class ConvCall {
 public:
  using Tensor = torch::stable::Tensor;

  // No BN, no addition, no activation, everything the planner's choice.
  ConvCall(const Tensor& x, const Tensor& weight, const ConvShape& shape, bool tf32);

  PlanRequest& request() { return request_; }
  // The tensor itself where the kernel can read it, else a copy (one launch more; explain() says so).
  void activation(const Tensor& t, int slot, const char* name);
  // The convolution's bias and its BN.
  void norm(const ConvNorm& conv);
  void projection(const Tensor& proj_x, const ConvNorm& conv, const std::vector<int64_t>& stride);

  // When all is collected.
  const Plan& plan();
  Tensor empty_output(const Plan& plan) const;
  void address(int slot, const void* p) { addresses_[slot] = p; }
  // Launches, unless the grid is empty; all tensors live until the kernel is on the stream.
  void launch(const Plan& plan);

 private:
  NormRequest norm_request(const ConvNorm& conv, int first_slot);

  const Tensor& x_;
  const int32_t device_;
  const DeviceGuard guard_;
  PlanRequest request_;
  const void* addresses_[kTensorCount] = {};
  std::vector<Tensor> kept_;  // what was made dense
};

}  // namespace fused_resnet
