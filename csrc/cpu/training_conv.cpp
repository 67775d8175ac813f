// fused_resnet_C::conv_pack_input_gradient and conv_weight_gradient: what a training step needs beside
// conv_pack and conv_fused (conv_ops.cpp), which compute the forward pass and the input's gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "kernel_choice.h"
#include "memory.h"
#include "tensors.h"
#include "weight_gradient.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

void check_tile(int64_t m) {
  check(m == 2 || m == 4, "m", "2 or 4, the tile of F(m x m, 3 x 3)", m);
}

const WeightGradientKernel& weight_gradient_kernel(int64_t m, const std::string& isa) {
  check_tile(m);
  const std::string name = kernels_called(isa).vectors;
  const WeightGradientKernels* set = &kWeightGradientPortable;
#if defined(__x86_64__)
  if (name == "avx512") set = &kWeightGradientAvx512;
  if (name == "avx2") set = &kWeightGradientAvx2;
#endif
  return m == 2 ? set->f2 : set->f4;
}

// With stride 1 the gradient of x is itself a convolution: of grad_y, padded by 2 - padding, with the filter
// turned by 180 degrees and its input and output channels exchanged. All of that is a matter of strides.
Tensor conv_pack_input_gradient(const Tensor& weight, int64_t m, const std::string& isa,
                                const std::string& weights) {
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "weight", "a filter [K, C, 3, 3]",
        shape_of(weight));
  check(weight.scalar_type() == ScalarType::Float, "weight", "dtype float32", "another one");
  check_tile(m);
  ConvShape shape{};
  shape.k = weight.size(1), shape.c = weight.size(0), shape.r = 3, shape.s = 3;
  const ConvKernel& kernel = conv_kernel(m, weight_kind(weights), isa, shape);
  Tensor packed = torch::stable::empty({kernel.weight_floats(shape)}, ScalarType::Float);
  const float* last =
      static_cast<const float*>(weight.const_data_ptr()) + 2 * weight.stride(2) + 2 * weight.stride(3);
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t stride[4] = {weight.stride(1), weight.stride(0), -weight.stride(2), -weight.stride(3)};
  torch::stable::parallel_for(0, ceil_div(shape.k, kernel.panel), 1, [&](int64_t begin, int64_t end) {
    kernel.pack_weights(shape, last, stride, begin, end, to);
  });
  return packed;
}

// sum[i] = the splits' values one after another, in their order.
void sum_splits(const float* splits, int64_t count, int64_t size, float* sum) {
  torch::stable::parallel_for(0, size, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum[i] = splits[i] + splits[size + i];
    for (int64_t split = 2; split < count; ++split) {
      for (int64_t i = begin; i < end; ++i) sum[i] += splits[split * size + i];
    }
  });
}

Tensor conv_weight_gradient(const Tensor& x, const Tensor& grad_y, const std::vector<int64_t>& padding,
                            int64_t m, const std::string& isa) {
  check(x.dim() == 4 && x.scalar_type() == ScalarType::Float, "x", "four dimensions of float32", shape_of(x));
  check(grad_y.dim() == 4 && grad_y.scalar_type() == ScalarType::Float, "grad_y",
        "four dimensions of float32", shape_of(grad_y));
  check(x.size(1) == 1 || x.stride(1) == 1, "x", "channels innermost", "channel stride ", x.stride(1));
  check(grad_y.size(1) == 1 || grad_y.stride(1) == 1, "grad_y", "channels innermost", "channel stride ",
        grad_y.stride(1));
  check(padding.size() == 2, "padding", "two numbers", padding.size());
  WeightGradientProblem problem{};
  ConvShape& shape = problem.shape;
  shape.n = x.size(0), shape.c = x.size(1), shape.h = x.size(2), shape.w = x.size(3);
  shape.k = grad_y.size(1), shape.r = 3, shape.s = 3;
  shape.p = grad_y.size(2), shape.q = grad_y.size(3);
  shape.stride_h = shape.stride_w = shape.dilation_h = shape.dilation_w = 1;
  shape.pad_h = padding[0], shape.pad_w = padding[1];
  check(grad_y.size(0) == shape.n && shape.p == shape.h + 2 * shape.pad_h - 2 &&
            shape.q == shape.w + 2 * shape.pad_w - 2,
        "grad_y", "the shape of a 3 x 3 convolution's output", shape_of(grad_y), " for x ", shape_of(x));
  check(shape.n > 0, "x", "at least one image", shape_of(x));
  problem.x = static_cast<const float*>(x.const_data_ptr());
  problem.grad_y = static_cast<const float*>(grad_y.const_data_ptr());
  problem.x_stride[0] = x.stride(0), problem.x_stride[1] = x.stride(2), problem.x_stride[2] = x.stride(3);
  problem.grad_y_stride[0] = grad_y.stride(0), problem.grad_y_stride[1] = grad_y.stride(2),
  problem.grad_y_stride[2] = grad_y.stride(3);

  Tensor d_weight = torch::stable::empty({shape.k, shape.c, 3, 3}, ScalarType::Float, std::nullopt,
                                         std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  float* result = static_cast<float*>(d_weight.mutable_data_ptr());
  const WeightGradientKernel& kernel = weight_gradient_kernel(m, isa);
  const WeightGradientPlan plan = kernel.plan(shape, static_cast<int>(torch::stable::get_num_threads()));
  const int64_t size = shape.k * 9 * shape.c;
  std::vector<float> splits(static_cast<size_t>(plan.splits > 1 ? plan.splits * size : 0));
  float* to = plan.splits > 1 ? splits.data() : result;
  torch::stable::parallel_for(0, plan.pieces(), 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(plan.scratch_floats);
    for (int64_t piece = begin; piece < end; ++piece) kernel.run_piece(problem, plan, piece, to, scratch);
  });
  if (plan.splits > 1) sum_splits(splits.data(), plan.splits, size, result);
  return d_weight;
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("conv_pack_input_gradient", TORCH_BOX(&fused_resnet::cpu::conv_pack_input_gradient));
  m.impl("conv_weight_gradient", TORCH_BOX(&fused_resnet::cpu::conv_weight_gradient));
}
