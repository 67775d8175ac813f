// fused_resnet_C::winograd_pack and winograd_conv: arguments -> problem -> threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "memory.h"
#include "tensors.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

// `isa` is empty for the best instruction set; tests name the others.
const WinogradKernel& kernel_for(int64_t m, const std::string& isa) {
  check(m == 2 || m == 4, "m", "2 or 4", m);
  const Kernels* set = isa.empty() ? &kernels() : kernels_for(isa.c_str());
  check(set != nullptr, "isa", "an instruction set of this CPU", isa);
  return m == 2 ? set->winograd2 : set->winograd4;
}

Tensor winograd_pack(const Tensor& weight, int64_t m, const std::string& isa) {
  const WinogradKernel& kernel = kernel_for(m, isa);
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "weight", "shape [K, C, 3, 3]",
        shape_of(weight));
  check(weight.scalar_type() == ScalarType::Float, "weight", "dtype float32", "another one");
  const int64_t k = weight.size(0), c = weight.size(1), panels = (k + kernel.panel - 1) / kernel.panel;
  Tensor packed = torch::stable::empty({kernel.weight_floats(c, k)}, ScalarType::Float);
  const float* from = static_cast<const float*>(weight.const_data_ptr());
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t stride[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    kernel.transform_weights(from, stride, c, k, begin, end, to);
  });
  return packed;
}

Tensor winograd_conv(const Tensor& x, const Tensor& packed, int64_t k, int64_t m, const std::string& isa,
                     int64_t pad_h, int64_t pad_w, const OptionalTensor& bias,
                     const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
                     const OptionalTensor& residual, int64_t activation) {
  const WinogradKernel& kernel = kernel_for(m, isa);
  WinogradProblem problem;
  check(x.dim() == 4, "x", "4 dimensions", x.dim());
  check(x.scalar_type() == ScalarType::Float, "x", "dtype float32", "another one");
  problem.n = x.size(0), problem.c = x.size(1), problem.h = x.size(2), problem.w = x.size(3);
  problem.k = k, problem.p = problem.h + 2 * pad_h - 2, problem.q = problem.w + 2 * pad_w - 2;
  problem.pad_h = pad_h, problem.pad_w = pad_w;
  check(problem.p > 0 && problem.q > 0, "x", "an image no smaller than the filter", shape_of(x));
  check(problem.c == 1 || x.stride(1) == 1, "x", "channels innermost", "channel stride ", x.stride(1));
  check(packed.numel() == kernel.weight_floats(problem.c, k), "packed",
        "what winograd_pack made for this C and K", packed.numel(), " values");
  problem.x = static_cast<const float*>(x.const_data_ptr());
  problem.weights = static_cast<const float*>(packed.const_data_ptr());
  problem.residual = nullptr;
  if (residual.has_value()) {
    const Tensor& r = *residual;
    check(r.scalar_type() == ScalarType::Float, "residual", "dtype float32", "another one");
    check(r.dim() == 4 && r.size(0) == problem.n && r.size(1) == k && r.size(2) == problem.p &&
              r.size(3) == problem.q,
          "residual", "the shape of the output", shape_of(r));
    check(k == 1 || r.stride(1) == 1, "residual", "channels innermost", "channel stride ", r.stride(1));
    problem.residual = static_cast<const float*>(r.const_data_ptr());
  }
  const ScaleShift bn({bias, bn_weight, bn_bias, running_mean, running_var, eps}, k);
  problem.scale = bn.scale.data();
  problem.shift = bn.shift.data();
  problem.activation = activation_from(activation);

  Tensor y = torch::stable::empty({problem.n, k, problem.p, problem.q}, ScalarType::Float, std::nullopt,
                                  std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  problem.y = static_cast<float*>(y.mutable_data_ptr());
  const int dims[3] = {0, 2, 3};
  for (int i = 0; i < 3; ++i) {
    problem.x_stride[i] = x.stride(dims[i]);
    problem.residual_stride[i] = residual.has_value() ? residual->stride(dims[i]) : 0;
  }
  problem.y_stride[0] = problem.p * problem.q * k, problem.y_stride[1] = problem.q * k,
  problem.y_stride[2] = k;
  if (problem.n == 0) return y;

  const WinogradPlan plan = kernel.plan(problem, static_cast<int>(torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, plan.tile_blocks * plan.k_blocks, 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(plan.scratch_floats);
    for (int64_t piece = begin; piece < end; ++piece) kernel.run_piece(problem, plan, piece, scratch);
  });
  return y;
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&fused_resnet::cpu::winograd_pack));
  m.impl("winograd_conv", TORCH_BOX(&fused_resnet::cpu::winograd_conv));
}
