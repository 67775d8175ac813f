// Kernels by the names that operators are called with.
#pragma once

#include <string>

#include "isa.h"

namespace fused_resnet::cpu {

// `isa` is empty for the best instruction set; tests name others.
const Kernels& kernels_called(const std::string& isa);

// What is kept of the weights, by name and by number as fused_resnet/backends/cpu_program.py has them.
enum class WeightKind {
  kWhole,        // the values that are multiplied, made once and for all
  kFresh,        // the weights themselves, transformed in each call (Winograd)
  kBf16x3,       // those values in three bfloat16 parts, for matrix tiles
  kFreshBf16x3,  // the weights themselves, taken apart in each call
  kBf16x3Stem,   // as kBf16x3, in the order of the kernel with a max pool
  kBf16          // the weights in bfloat16, for activations in bfloat16 (direct, with a max pool too)
};
constexpr const char* kWeightKinds[] = {"whole", "fresh", "bf16x3", "fresh bf16x3", "bf16x3 stem", "bf16"};
WeightKind weight_kind(const std::string& name);
WeightKind weight_kind(int64_t number);

// m: 0 for direct convolution, 2 and 4 for Winograd F(m x m, 3 x 3). bf16: whether the activations are in
// bfloat16; the weights of Winograd are float32 in either case.
const ConvKernel& conv_kernel(int64_t m, WeightKind weights, const std::string& isa, const ConvShape& shape,
                              bool bf16 = false);

// Convolution and max pool in one pass: kWhole or kBf16x3Stem, and kBf16.
const PooledKernel& pooled_kernel(WeightKind weights, const std::string& isa, const ConvShape& shape);

}  // namespace fused_resnet::cpu
