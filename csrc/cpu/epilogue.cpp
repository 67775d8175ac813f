// fused_resnet_C::scale_shift_add_act_
#include "epilogue.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "isa.h"
#include "tensors.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;

Scalar scalar_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Scalar::kFloat;
    case ScalarType::BFloat16:
      return Scalar::kBFloat16;
    case ScalarType::Half:
      return Scalar::kHalf;
    default:
      check(false, name, "dtype float32, bfloat16 or float16", "another one");
  }
  return Scalar::kFloat;
}

// Dense in the same order as y, so that both are one array.
bool laid_out_as(const Tensor& t, const Tensor& y) {
  for (int64_t dim = 0; dim < y.dim(); ++dim) {
    if (t.size(dim) != y.size(dim) || (y.size(dim) != 1 && t.stride(dim) != y.stride(dim))) return false;
  }
  return true;
}

void scale_shift_add_act_(const Tensor& y, const OptionalTensor& bias, const OptionalTensor& bn_weight,
                          const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var, double eps, const OptionalTensor& residual,
                          int64_t activation) {
  check(y.dim() == 4, "y", "4 dimensions", y.dim());
  const bool channels_last = is_channels_last(y);
  check(channels_last || y.is_contiguous(), "y", "a dense tensor, contiguous or channels_last",
        "other strides");
  if (residual.has_value()) {
    check(residual->scalar_type() == y.scalar_type(), "residual", "the dtype of y", "another one");
    check(laid_out_as(*residual, y), "residual", "the shape and strides of y", shape_of(*residual));
  }
  if (y.numel() == 0) return;
  const ScaleShift bn({bias, bn_weight, bn_bias, running_mean, running_var, eps}, y.size(1));
  EpilogueProblem problem;
  problem.y = y.mutable_data_ptr();
  problem.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  problem.scale = bn.scale();
  problem.shift = bn.shift();
  problem.scalar = scalar_of(y, "y");
  problem.activation = activation_from(activation);
  problem.channels_last = channels_last;
  problem.channels = y.size(1);
  problem.row_length = channels_last ? y.size(1) : y.size(2) * y.size(3);
  const int64_t rows = y.numel() / problem.row_length;
  // A thread is worth waking for some 32 kB of work.
  const int64_t grain = std::max<int64_t>(1, 8192 / problem.row_length);
  torch::stable::parallel_for(
      0, rows, grain, [&](int64_t begin, int64_t end) { kernels().epilogue.run(problem, begin, end); });
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("scale_shift_add_act_", TORCH_BOX(&fused_resnet::cpu::scale_shift_add_act_));
}
