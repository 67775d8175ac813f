// The operator fused_resnet_C::cuda_conv_bn_add_relu: tensors -> request -> plan -> workspace -> launch, on
// torch's current stream. No synchronisation, and nothing but the kernel reaches the stream, so it may be
// captured into a CUDA graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../checks.h"
#include "conv_call.h"
#include "tensors.h"

namespace fused_resnet {
namespace {

using torch::stable::Tensor;

Tensor conv_bn_add_relu(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor bn_weight,
                        OptionalTensor bn_bias, OptionalTensor running_mean, OptionalTensor running_var,
                        double eps, OptionalTensor residual, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        OptionalTensor proj_x, OptionalTensor proj_weight, OptionalTensor proj_bias,
                        OptionalTensor proj_bn_weight, OptionalTensor proj_bn_bias,
                        OptionalTensor proj_running_mean, OptionalTensor proj_running_var, double proj_eps,
                        std::vector<int64_t> proj_stride, int64_t activation, bool tf32, int64_t tile_m,
                        int64_t tile_n, int64_t splits, int64_t family) {
  ConvCall call(x, weight, {stride, padding, dilation, groups}, tf32);
  PlanRequest& q = call.request();
  q.activation = static_cast<int32_t>(activation);
  q.tile_m = size32(tile_m, "tile_m");
  q.tile_n = size32(tile_n, "tile_n");
  q.splits = size32(splits, "splits");
  q.family = size32(family, "family");
  call.norm({weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, ""});
  if (proj_x) {
    check(proj_weight.has_value(), "proj_weight", "a tensor beside proj_x", "none");
    call.projection(*proj_x,
                    {*proj_weight, proj_bias, proj_bn_weight, proj_bn_bias, proj_running_mean,
                     proj_running_var, proj_eps, "proj_"},
                    proj_stride);
  }
  if (residual) {
    q.residual_dtype = dtype_of(*residual, "residual");
    call.activation(*residual, kTensorResidual, "residual");
  }
  const Plan& plan = call.plan();
  if (residual) {
    check(residual->dim() == 4 && residual->size(0) == q.n && residual->size(1) == q.k &&
              residual->size(2) == plan.params.p && residual->size(3) == plan.params.q,
          "residual", "the shape of the convolution's output", "another");
  }
  Tensor y = call.empty_output(plan);
  call.address(kTensorY, y.data_ptr());
  call.launch(plan);
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
      "int activation, bool tf32, int tile_m, int tile_n, int splits, int family) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("cuda_conv_bn_add_relu", TORCH_BOX(&fused_resnet::conv_bn_add_relu));
}
