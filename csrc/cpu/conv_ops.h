// The fused convolution with its arguments checked, for every operator that makes one.
#pragma once

#include <string>
#include <vector>

#include "kernel_choice.h"
#include "tensors.h"

namespace fused_resnet::cpu {

// As fused_resnet_C::conv_fused.
Tensor fused_convolution(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& filter, int64_t m,
                         const std::string& isa, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         const BatchNormArguments& bn, const OptionalTensor& residual, int64_t activation,
                         WeightKind weights);

// As fused_resnet_C::conv_max_pool; `pool` holds window, stride and padding, two numbers each.
Tensor pooled_convolution(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& filter,
                          const std::string& isa, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          const BatchNormArguments& bn, int64_t activation, const std::vector<int64_t>& pool,
                          WeightKind weights);

}  // namespace fused_resnet::cpu
