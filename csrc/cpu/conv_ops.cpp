// fused_resnet_C::conv_pack, conv_fused and conv_max_pool: arguments -> problem -> threads.
#include "conv_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_choice.h"
#include "memory.h"
#include "output_pool.h"
#include "tensors.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

// Uninitialised, in huge pages of its own unless it is small.
Tensor empty_weights(int64_t floats) {
  const Extent extent(floats * int64_t(sizeof(float)));
  if (extent.alignment < kHugePage) return torch::stable::empty({floats}, ScalarType::Float);
  // torch aligns to 64 bytes: room for the next boundary, which is never touched.
  Tensor all = torch::stable::empty({(extent.bytes + kHugePage) / int64_t(sizeof(float))}, ScalarType::Float);
  void* begin = all.mutable_data_ptr();
  auto room = static_cast<size_t>(extent.bytes + kHugePage);
  std::align(static_cast<size_t>(kHugePage), static_cast<size_t>(extent.bytes), begin, room);
  advise_huge_pages(begin, extent.bytes);
  const auto* first = static_cast<const float*>(all.const_data_ptr());
  return torch::stable::narrow(all, 0, static_cast<const float*>(begin) - first, floats);
}

Tensor conv_pack(const Tensor& weight, int64_t m, const std::string& isa, const std::string& weights) {
  check(weight.dim() == 4, "weight", "4 dimensions", weight.dim());
  check(weight.scalar_type() == ScalarType::Float, "weight", "dtype float32", "another one");
  ConvShape shape{};
  shape.k = weight.size(0), shape.c = weight.size(1), shape.r = weight.size(2), shape.s = weight.size(3);
  const auto pack = [&](const auto& kernel) {
    Tensor packed = empty_weights(kernel.weight_floats(shape));
    const float* from = static_cast<const float*>(weight.const_data_ptr());
    float* to = static_cast<float*>(packed.mutable_data_ptr());
    const int64_t stride[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
    torch::stable::parallel_for(0, ceil_div(shape.k, kernel.panel), 1, [&](int64_t begin, int64_t end) {
      kernel.pack_weights(shape, from, stride, begin, end, to);
    });
    return packed;
  };
  const WeightKind kind = weight_kind(weights);
  if (kind == WeightKind::kBf16x3Stem) {
    shape.dilation_h = shape.dilation_w = 1;  // of the filter alone; the order does not depend on the rest
    return pack(pooled_kernel(kind, isa, shape));
  }
  return pack(conv_kernel(m, kind, isa, shape, kind == WeightKind::kBf16));
}

// Strides of n, h and w.
void pixel_strides(const Tensor& t, int64_t out[3]) {
  out[0] = t.stride(0), out[1] = t.stride(2), out[2] = t.stride(3);
}

// Sizes and pointers of x and the weights; the rest of the problem is for the caller.
ConvProblem read_problem(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& filter,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                         const std::vector<int64_t>& dilation) {
  check(x.dim() == 4, "x", "4 dimensions", x.dim());
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, "x",
        "dtype float32 or bfloat16", "another one");
  check(filter.size() == 3, "filter", "K, R and S", filter.size(), " numbers");
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "stride, padding, dilation",
        "two numbers each", stride.size(), ", ", padding.size(), ", ", dilation.size());
  ConvProblem problem{};
  ConvShape& shape = problem.shape;
  shape.n = x.size(0), shape.c = x.size(1), shape.h = x.size(2), shape.w = x.size(3);
  shape.k = filter[0], shape.r = filter[1], shape.s = filter[2];
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_h = padding[0], shape.pad_w = padding[1];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  check(shape.stride_h > 0 && shape.stride_w > 0, "stride", "positive numbers", stride[0], ", ", stride[1]);
  check(shape.dilation_h > 0 && shape.dilation_w > 0, "dilation", "positive numbers", dilation[0], ", ",
        dilation[1]);
  check(shape.pad_h >= 0 && shape.pad_w >= 0, "padding", "no negative numbers", padding[0], ", ", padding[1]);
  const int64_t room_h = shape.h + 2 * shape.pad_h - shape.dilation_h * (shape.r - 1) - 1;
  const int64_t room_w = shape.w + 2 * shape.pad_w - shape.dilation_w * (shape.s - 1) - 1;
  if (room_h < 0 || room_w < 0) {  // as Problem.checked() in Python
    std::ostringstream message;
    message << "x: " << shape.h << "x" << shape.w << " is too small for a " << shape.r << "x" << shape.s
            << " filter with padding (" << shape.pad_h << ", " << shape.pad_w << ") and dilation ("
            << shape.dilation_h << ", " << shape.dilation_w << ")";
    throw std::invalid_argument(message.str());
  }
  shape.p = room_h / shape.stride_h + 1, shape.q = room_w / shape.stride_w + 1;
  check(shape.c == 1 || x.stride(1) == 1, "x", "channels innermost", "channel stride ", x.stride(1));
  problem.x = x.const_data_ptr();
  pixel_strides(x, problem.x_stride);
  problem.weights = static_cast<const float*>(packed.const_data_ptr());
  return problem;
}

bool is_bfloat16(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16;
}

template <class Kernel>
void check_packed(const Tensor& packed, const Kernel& kernel, const ConvShape& shape) {
  check(packed.numel() == kernel.weight_floats(shape), "packed", "what conv_pack made for this filter",
        packed.numel(), " values");
}

}  // namespace

Tensor fused_convolution(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& filter, int64_t m,
                         const std::string& isa, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         const BatchNormArguments& bn_arguments, const OptionalTensor& residual,
                         int64_t activation, WeightKind weights) {
  ConvProblem problem = read_problem(x, packed, filter, stride, padding, dilation);
  const ConvShape& shape = problem.shape;
  const bool bf16 = is_bfloat16(x);
  const ConvKernel& kernel = conv_kernel(m, weights, isa, shape, bf16);
  check(m == 0 ||
            (shape.stride_h == 1 && shape.stride_w == 1 && shape.dilation_h == 1 && shape.dilation_w == 1),
        "m", "0 unless stride and dilation are 1", m);
  check_packed(packed, kernel, shape);
  if (residual.has_value()) {
    const Tensor& t = *residual;
    check(t.scalar_type() == x.scalar_type(), "residual", "the dtype of x", "another one");
    check(t.dim() == 4 && t.size(0) == shape.n && t.size(1) == shape.k && t.size(2) == shape.p &&
              t.size(3) == shape.q,
          "residual", "the shape of the output", shape_of(t));
    check(shape.k == 1 || t.stride(1) == 1, "residual", "channels innermost", "channel stride ", t.stride(1));
    check(m != 0 || is_channels_last(t), "residual", "a dense channels_last tensor for direct convolution",
          "other strides");
    problem.residual = t.const_data_ptr();
    pixel_strides(t, problem.residual_stride);
  }
  const ScaleShift bn(bn_arguments, shape.k);
  problem.scale = bn.scale();
  problem.shift = bn.shift();
  problem.activation = activation_from(activation);

  Tensor y = empty_output(shape.n, shape.k, shape.p, shape.q, bf16);
  if (shape.n == 0) return y;
  problem.y = y.mutable_data_ptr();
  problem.y_stride[0] = shape.p * shape.q * shape.k;
  problem.y_stride[1] = shape.q * shape.k;
  problem.y_stride[2] = shape.k;

  const ConvPlan plan = kernel.plan(shape, static_cast<int>(torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, plan.row_blocks * plan.k_blocks, 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(plan.scratch_floats);
    for (int64_t piece = begin; piece < end; ++piece) kernel.run_piece(problem, plan, piece, scratch);
  });
  return y;
}

Tensor pooled_convolution(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& filter,
                          const std::string& isa, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          const BatchNormArguments& bn_arguments, int64_t activation,
                          const std::vector<int64_t>& pool_sizes, WeightKind weights) {
  ConvProblem problem = read_problem(x, packed, filter, stride, padding, dilation);
  const ConvShape& shape = problem.shape;
  const PooledKernel& kernel = pooled_kernel(weights, isa, shape);
  const bool bf16 = is_bfloat16(x);
  check(bf16 == (weights == WeightKind::kBf16), "weights", "bf16 for x in bfloat16, and only there",
        kWeightKinds[static_cast<size_t>(weights)]);
  check_packed(packed, kernel, shape);
  check(weights != WeightKind::kBf16x3Stem || shape.w == 1 || problem.x_stride[2] == shape.c, "x",
        "pixels side by side for bf16x3 stem", "a stride of ", problem.x_stride[2]);
  check(pool_sizes.size() == 6, "pool", "window, stride and padding, two numbers each", pool_sizes.size(),
        " numbers");
  Pool pool{pool_sizes[0], pool_sizes[1], pool_sizes[2], pool_sizes[3], pool_sizes[4], pool_sizes[5], 0, 0};
  check(pool.window_h > 0 && pool.window_w > 0 && pool.window_h <= kMaxWindow, "pool window",
        "1 to 8 rows and at least one column", pool.window_h, " x ", pool.window_w);
  check(pool.stride_h > 0 && pool.stride_w > 0, "pool stride", "positive numbers", pool.stride_h, ", ",
        pool.stride_w);
  // Half a window at most, as torch has it: so every window holds a pixel.
  check(pool.pad_h >= 0 && pool.pad_w >= 0 && 2 * pool.pad_h <= pool.window_h &&
            2 * pool.pad_w <= pool.window_w,
        "pool padding", "at most half the window", pool.pad_h, ", ", pool.pad_w);
  const int64_t room_h = shape.p + 2 * pool.pad_h - pool.window_h,
                room_w = shape.q + 2 * pool.pad_w - pool.window_w;
  check(room_h >= 0 && room_w >= 0, "pool window", "no larger than the padded image", pool.window_h, " x ",
        pool.window_w);
  pool.p = room_h / pool.stride_h + 1, pool.q = room_w / pool.stride_w + 1;
  const ScaleShift bn(bn_arguments, shape.k);
  problem.scale = bn.scale();
  problem.shift = bn.shift();
  problem.activation = activation_from(activation);

  Tensor y = empty_output(shape.n, shape.k, pool.p, pool.q, bf16);
  if (shape.n == 0) return y;
  problem.y = y.mutable_data_ptr();
  // Parts of one image share a row or two of the convolution, so there are no more than the threads need.
  const int64_t parts = std::min(pool.p, ceil_div(torch::stable::get_num_threads(), shape.n));
  torch::stable::parallel_for(0, shape.n * parts, 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(kernel.scratch_floats(shape, pool));
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t part = piece % parts;
      kernel.run(problem, pool, piece / parts, pool.p * part / parts, pool.p * (part + 1) / parts, scratch);
    }
  });
  return y;
}

namespace {

Tensor conv_fused(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& filter, int64_t m,
                  const std::string& isa, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                  const OptionalTensor& bias, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
                  const OptionalTensor& residual, int64_t activation, const std::string& weights) {
  return fused_convolution(x, packed, filter, m, isa, stride, padding, dilation,
                           {bias, bn_weight, bn_bias, running_mean, running_var, eps}, residual, activation,
                           weight_kind(weights));
}

Tensor conv_max_pool(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& filter,
                     const std::string& isa, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     const OptionalTensor& bias, const OptionalTensor& bn_weight,
                     const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, double eps, int64_t activation,
                     const std::vector<int64_t>& pool, const std::string& weights) {
  return pooled_convolution(x, packed, filter, isa, stride, padding, dilation,
                            {bias, bn_weight, bn_bias, running_mean, running_var, eps}, activation, pool,
                            weight_kind(weights));
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&fused_resnet::cpu::conv_pack));
  m.impl("conv_fused", TORCH_BOX(&fused_resnet::cpu::conv_fused));
  m.impl("conv_max_pool", TORCH_BOX(&fused_resnet::cpu::conv_max_pool));
}
