#include "conv_call.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../checks.h"
#include "launch.h"
#include "tensors.h"
#include "workspace.h"

namespace fused_resnet {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

Tensor channels_last(const Tensor& t) {
  if (t.numel() == 0 || dense_channels_last(t)) return t;
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

Tensor dense_vector(const Tensor& t) {
  return t.numel() < 2 || t.stride(0) == 1 ? t : torch::stable::contiguous(t);
}

std::pair<int32_t, int32_t> pair_of(const std::vector<int64_t>& v, const char* name) {
  check(v.size() == 2, name, "two numbers", v.size());
  return {size32(v[0], name), size32(v[1], name)};
}

int alignment_of(const void* const* addresses, std::initializer_list<int> slots) {
  uintptr_t bits = 16;
  for (const int slot : slots) bits |= reinterpret_cast<uintptr_t>(addresses[slot]);
  return static_cast<int>(bits & (~bits + 1));
}

int32_t check_x(const Tensor& x) {
  check(x.dim() == 4 && on_device(x), "x", "a CUDA tensor of 4 dimensions", x.dim(), " dimensions");
  return device_index(x);
}

}  // namespace

int32_t size32(int64_t size, const char* name) {
  check(size >= 0 && size <= (int64_t{1} << 30), name, "at most 2^30", size);
  return static_cast<int32_t>(size);
}

ConvCall::ConvCall(const Tensor& x, const Tensor& weight, const ConvShape& shape, bool tf32)
    : x_(x), device_(check_x(x)), guard_(device_) {
  check(weight.dim() == 4, "weight", "4 dimensions", weight.dim());
  check(weight.size(1) * shape.groups == x.size(1), "weight", "as many input channels as x / groups",
        weight.size(1));
  check(weight.scalar_type() == x.scalar_type(), "weight", "the dtype of x", "another");
  PlanRequest& q = request_;
  q.n = size32(x.size(0), "x");
  q.c = size32(x.size(1), "x");
  q.h = size32(x.size(2), "x");
  q.w = size32(x.size(3), "x");
  q.k = size32(weight.size(0), "weight");
  q.r = size32(weight.size(2), "weight");
  q.s = size32(weight.size(3), "weight");
  std::tie(q.stride_h, q.stride_w) = pair_of(shape.stride, "stride");
  std::tie(q.padding_h, q.padding_w) = pair_of(shape.padding, "padding");
  std::tie(q.dilation_h, q.dilation_w) = pair_of(shape.dilation, "dilation");
  q.groups = size32(shape.groups, "groups");
  q.dtype = dtype_of(x, "x");
  q.tf32 = tf32;
  q.activation = kActivationNone;
  kept_.reserve(20);
  activation(x, kTensorX, "x");
  activation(weight, kTensorWeight, "weight");
}

void ConvCall::activation(const Tensor& t, int slot, const char* name) {
  check(t.dim() == 4, name, "4 dimensions", t.dim());
  check_same_device(t, x_, name);
  kept_.push_back(channels_last(t));
  addresses_[slot] = kept_.back().data_ptr();
}

NormRequest ConvCall::norm_request(const ConvNorm& conv, int first_slot) {
  NormRequest norm;
  norm.eps = static_cast<float>(conv.eps);
  const OptionalTensor* vectors[] = {&conv.bias, &conv.bn_weight, &conv.bn_bias, &conv.running_mean,
                                     &conv.running_var};
  constexpr const char* kNames[] = {"bias", "bn_weight", "bn_bias", "running_mean", "running_var"};
  const int64_t k = conv.weight.size(0);
  for (int i = 0; i < 5; ++i) {
    if (!vectors[i]->has_value()) continue;
    const Tensor& t = **vectors[i];
    const std::string name = std::string(conv.prefix) + kNames[i];
    check(t.dim() == 1 && t.size(0) == k, name.c_str(), "one value per output channel", t.numel(), " values");
    check_same_device(t, x_, name.c_str());
    const int32_t dtype = dtype_of(t, name.c_str());
    int32_t& slot = i == 0 ? norm.bias_dtype : norm.norm_dtype;
    check(slot == kAbsent || slot == dtype, name.c_str(), "the dtype of the other BN tensors", "another");
    slot = dtype;
    kept_.push_back(dense_vector(t));
    addresses_[first_slot + i] = kept_.back().data_ptr();
  }
  check(conv.running_mean.has_value() == conv.running_var.has_value(), "running_mean and running_var",
        "both or neither", "one");
  check(conv.running_mean || !(conv.bn_weight || conv.bn_bias), "bn_weight and bn_bias",
        "running statistics beside them", "none");
  norm.affine = conv.bn_weight ? (conv.bn_bias ? kAffineBoth : kAffineWeight)
                : conv.bn_bias ? kAffineBias
                               : kAffineNone;
  return norm;
}

void ConvCall::norm(const ConvNorm& conv) {
  request_.norm = norm_request(conv, kTensorBias);
}

void ConvCall::projection(const Tensor& proj_x, const ConvNorm& conv, const std::vector<int64_t>& stride) {
  PlanRequest& q = request_;
  const Tensor& weight = conv.weight;
  check(proj_x.dim() == 4 && proj_x.size(0) == q.n, "proj_x", "4 dimensions and the batch size of x",
        proj_x.size(0));
  check(weight.dim() == 4 && weight.size(0) == q.k && weight.size(1) == proj_x.size(1) &&
            weight.size(2) == 1 && weight.size(3) == 1,
        "proj_weight", "[k, channels of proj_x, 1, 1]", "another shape");
  check(proj_x.scalar_type() == x_.scalar_type() && weight.scalar_type() == x_.scalar_type(), "proj_x",
        "the dtype of x, as proj_weight", "another");
  q.projection = 1;
  q.proj_c = size32(proj_x.size(1), "proj_x");
  q.proj_h = size32(proj_x.size(2), "proj_x");
  q.proj_w = size32(proj_x.size(3), "proj_x");
  std::tie(q.proj_stride_h, q.proj_stride_w) = pair_of(stride, "proj_stride");
  activation(proj_x, kTensorProjX, "proj_x");
  activation(weight, kTensorProjWeight, "proj_weight");
  q.proj_norm = norm_request(conv, kTensorProjBias);
}

const Plan& ConvCall::plan() {
  request_.alignment =
      alignment_of(addresses_, {kTensorX, kTensorWeight, kTensorProjX, kTensorProjWeight, kTensorResidual});
  return remembered_plan(request_, device_, &make_plan);
}

Tensor ConvCall::empty_output(const Plan& plan) const {
  const ConvParams& p = plan.params;
  return torch::stable::empty({request_.n, request_.k, p.p, p.q}, scalar_type(p.y_dtype), std::nullopt,
                              x_.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

void ConvCall::launch(const Plan& plan) {
  if (plan.grid[0] == 0) return;
  void* const stream = current_stream(device_);
  const Workspace workspace(plan.workspace_bytes, plan.counter_bytes, device_, stream);
  ConvParams params = bind_addresses(plan, addresses_);
  workspace.bind(params);
  char error[kErrorBytes];
  if (launch_plan(plan, params, stream, error, kErrorBytes)) throw std::runtime_error(error);
}

}  // namespace fused_resnet
