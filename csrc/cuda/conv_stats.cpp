// The operator fused_resnet_C::cuda_conv_stats: y = conv2d(x) and, from the same launch, mean and biased
// variance of y's channels, fp32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "conv_call.h"

namespace fused_resnet {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> conv_stats(Tensor x, Tensor weight, OptionalTensor bias,
                                              std::vector<int64_t> stride, std::vector<int64_t> padding,
                                              std::vector<int64_t> dilation, int64_t groups, bool tf32) {
  check(x.numel() > 0, "x", "at least one element", "none");
  ConvCall call(x, weight, {stride, padding, dilation, groups}, tf32);
  call.request().statistics = 1;
  const OptionalTensor none;
  call.norm({weight, bias, none, none, none, none, 0.0, ""});
  const Plan& plan = call.plan();
  const auto vector = [&] {
    return torch::stable::empty({weight.size(0)}, torch::headeronly::ScalarType::Float, std::nullopt,
                                x.device());
  };
  Tensor y = call.empty_output(plan), mean = vector(), var = vector();
  call.address(kTensorY, y.data_ptr());
  call.address(kTensorMean, mean.data_ptr());
  call.address(kTensorVar, var.data_ptr());
  call.launch(plan);
  return {y, mean, var};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_C, m) {
  m.def(
      "cuda_conv_stats(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool tf32) -> (Tensor y, Tensor mean, Tensor var)");
}
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("cuda_conv_stats", TORCH_BOX(&fused_resnet::conv_stats));
}
