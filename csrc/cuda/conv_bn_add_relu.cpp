// The operator fused_resnet_C::cuda_conv_bn_add_relu: tensors -> request -> plan -> workspace -> launch, on
// torch's current stream. No synchronisation, and nothing but the kernel reaches the stream (see workspace()
// for its first use), so it may be captured into a CUDA graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "launch.h"
#include "plan.h"
#include "tensors.h"
#include "torch_device.h"
#include "workspace.h"

namespace fused_resnet {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors and eps of one convolution with its BN.
struct Conv {
  const Tensor& weight;
  const OptionalTensor &bias, &bn_weight, &bn_bias, &running_mean, &running_var;
  double eps;
  const char* prefix;  // of the names in messages
};

// ---- layout ----

// The tensor itself where the kernel can read it, else a copy (one launch more; explain() says so).
Tensor channels_last(const Tensor& t) {
  if (t.numel() == 0 || dense_channels_last(t)) return t;
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

Tensor dense_vector(const Tensor& t) {
  return t.numel() < 2 || t.stride(0) == 1 ? t : torch::stable::contiguous(t);
}

// ---- request ----

// Fills the request for one convolution and the slots of its vectors; keeps alive what had to be copied.
NormRequest norm_request(const Conv& conv, const Tensor& x, int first_slot, const void** addresses,
                         std::vector<Tensor>& kept) {
  NormRequest norm = {kAbsent, kAbsent, 0, static_cast<float>(conv.eps)};
  const OptionalTensor* vectors[] = {&conv.bias, &conv.bn_weight, &conv.bn_bias, &conv.running_mean,
                                     &conv.running_var};
  constexpr const char* kNames[] = {"bias", "bn_weight", "bn_bias", "running_mean", "running_var"};
  const int64_t k = conv.weight.size(0);
  for (int i = 0; i < 5; ++i) {
    if (!vectors[i]->has_value()) continue;
    const Tensor& t = **vectors[i];
    const std::string name = std::string(conv.prefix) + kNames[i];
    check(t.dim() == 1 && t.size(0) == k, name.c_str(), "one value per output channel", t.numel(), " values");
    check_same_device(t, x, name.c_str());
    const int32_t dtype = dtype_of(t, name.c_str());
    int32_t& slot = i == 0 ? norm.bias_dtype : norm.norm_dtype;
    check(slot == kAbsent || slot == dtype, name.c_str(), "the dtype of the other BN tensors", "another");
    slot = dtype;
    kept.push_back(dense_vector(t));
    addresses[first_slot + i] = kept.back().data_ptr();
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

int32_t size32(int64_t size, const char* name) {
  check(size >= 0 && size <= (int64_t{1} << 30), name, "at most 2^30", size);
  return static_cast<int32_t>(size);
}

std::pair<int32_t, int32_t> pair_of(const std::vector<int64_t>& v, const char* name) {
  check(v.size() == 2, name, "two numbers", v.size());
  return {size32(v[0], name), size32(v[1], name)};
}

// ---- the operator ----

int alignment_of(const void* const* addresses, std::initializer_list<int> slots) {
  uintptr_t bits = 16;
  for (const int slot : slots) bits |= reinterpret_cast<uintptr_t>(addresses[slot]);
  return static_cast<int>(bits & (~bits + 1));
}

Tensor conv_bn_add_relu(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor bn_weight,
                        OptionalTensor bn_bias, OptionalTensor running_mean, OptionalTensor running_var,
                        double eps, OptionalTensor residual, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        OptionalTensor proj_x, OptionalTensor proj_weight, OptionalTensor proj_bias,
                        OptionalTensor proj_bn_weight, OptionalTensor proj_bn_bias,
                        OptionalTensor proj_running_mean, OptionalTensor proj_running_var, double proj_eps,
                        std::vector<int64_t> proj_stride, int64_t activation, bool tf32, int64_t tile_m,
                        int64_t tile_n, int64_t splits) {
  check(x.dim() == 4 && on_device(x), "x", "a CUDA tensor of 4 dimensions", x.dim(), " dimensions");
  check(weight.dim() == 4, "weight", "4 dimensions", weight.dim());
  check(weight.size(1) * groups == x.size(1), "weight", "as many input channels as x / groups",
        weight.size(1));
  check(weight.scalar_type() == x.scalar_type(), "weight", "the dtype of x", "another");
  check_same_device(weight, x, "weight");
  const int32_t device = device_index(x);
  const DeviceGuard guard(device);

  const void* addresses[kTensorCount] = {};
  std::vector<Tensor> kept;  // what was made dense, until the launch is on the stream
  kept.reserve(16);
  const auto dense = [&](const Tensor& t, int slot) {
    kept.push_back(channels_last(t));
    addresses[slot] = kept.back().data_ptr();
  };

  PlanRequest q;
  std::memset(&q, 0, sizeof(q));
  q.n = size32(x.size(0), "x");
  q.c = size32(x.size(1), "x");
  q.h = size32(x.size(2), "x");
  q.w = size32(x.size(3), "x");
  q.k = size32(weight.size(0), "weight");
  q.r = size32(weight.size(2), "weight");
  q.s = size32(weight.size(3), "weight");
  std::tie(q.stride_h, q.stride_w) = pair_of(stride, "stride");
  std::tie(q.padding_h, q.padding_w) = pair_of(padding, "padding");
  std::tie(q.dilation_h, q.dilation_w) = pair_of(dilation, "dilation");
  q.groups = size32(groups, "groups");
  q.dtype = dtype_of(x, "x");
  q.tf32 = tf32;
  q.residual_dtype = kAbsent;
  q.activation = static_cast<int32_t>(activation);
  q.tile_m = size32(tile_m, "tile_m");
  q.tile_n = size32(tile_n, "tile_n");
  q.splits = size32(splits, "splits");
  dense(x, kTensorX);
  dense(weight, kTensorWeight);
  q.norm = norm_request({weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, ""}, x,
                        kTensorBias, addresses, kept);
  q.proj_norm = {kAbsent, kAbsent, 0, 0};
  q.proj_stride_h = q.proj_stride_w = 1;
  if (proj_x) {
    check(proj_weight.has_value(), "proj_weight", "a tensor beside proj_x", "none");
    check(proj_x->dim() == 4 && proj_x->size(0) == q.n, "proj_x", "4 dimensions and the batch size of x",
          proj_x->size(0));
    check(proj_weight->dim() == 4 && proj_weight->size(0) == q.k && proj_weight->size(1) == proj_x->size(1) &&
              proj_weight->size(2) == 1 && proj_weight->size(3) == 1,
          "proj_weight", "[k, channels of proj_x, 1, 1]", "another shape");
    check(proj_x->scalar_type() == x.scalar_type() && proj_weight->scalar_type() == x.scalar_type(), "proj_x",
          "the dtype of x, as proj_weight", "another");
    check_same_device(*proj_x, x, "proj_x");
    check_same_device(*proj_weight, x, "proj_weight");
    q.projection = 1;
    q.proj_c = size32(proj_x->size(1), "proj_x");
    q.proj_h = size32(proj_x->size(2), "proj_x");
    q.proj_w = size32(proj_x->size(3), "proj_x");
    std::tie(q.proj_stride_h, q.proj_stride_w) = pair_of(proj_stride, "proj_stride");
    dense(*proj_x, kTensorProjX);
    dense(*proj_weight, kTensorProjWeight);
    q.proj_norm = norm_request({*proj_weight, proj_bias, proj_bn_weight, proj_bn_bias, proj_running_mean,
                                proj_running_var, proj_eps, "proj_"},
                               x, kTensorProjBias, addresses, kept);
  }
  if (residual) {
    q.residual_dtype = dtype_of(*residual, "residual");
    check_same_device(*residual, x, "residual");
    dense(*residual, kTensorResidual);
  }
  q.alignment =
      alignment_of(addresses, {kTensorX, kTensorWeight, kTensorProjX, kTensorProjWeight, kTensorResidual});

  const Plan& plan = remembered_plan(q, device, &make_plan);
  const ConvParams& p = plan.params;
  if (residual) {
    check(residual->dim() == 4 && residual->size(0) == q.n && residual->size(1) == q.k &&
              residual->size(2) == p.p && residual->size(3) == p.q,
          "residual", "the shape of the convolution's output", "another");
  }
  Tensor y = torch::stable::empty({q.n, q.k, p.p, p.q}, scalar_type(p.y_dtype), std::nullopt, x.device(),
                                  std::nullopt, MemoryFormat::ChannelsLast);
  if (plan.grid[0] == 0) return y;
  addresses[kTensorY] = y.data_ptr();
  void* const stream = current_stream(device);
  if (plan.workspace_bytes) {
    kept.push_back(workspace_for(plan.workspace_bytes, plan.counter_bytes, device, stream));
    addresses[kTensorWorkspace] = kept.back().data_ptr();
  }
  char error[kErrorBytes];
  if (launch_plan(plan, bind_addresses(plan, addresses), stream, error, kErrorBytes))
    throw std::runtime_error(error);
  return y;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_C, m) {
  m.def(
      "cuda_conv_bn_add_relu(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? running_mean, Tensor? running_var, float eps, Tensor? residual, int[] stride, int[] padding, "
      "int[] dilation, int groups, Tensor? proj_x, Tensor? proj_weight, Tensor? proj_bias, Tensor? "
      "proj_bn_weight, "
      "Tensor? proj_bn_bias, Tensor? proj_running_mean, Tensor? proj_running_var, float proj_eps, int[] "
      "proj_stride, "
      "int activation, bool tf32, int tile_m, int tile_n, int splits) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("cuda_conv_bn_add_relu", TORCH_BOX(&fused_resnet::conv_bn_add_relu));
}
