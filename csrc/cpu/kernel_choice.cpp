#include "kernel_choice.h"

#include <algorithm>
#include <iterator>

#include "../checks.h"

namespace fused_resnet::cpu {

const Kernels& kernels_called(const std::string& isa) {
  const Kernels* set = isa.empty() ? &kernels() : kernels_for(isa.c_str());
  check(set != nullptr, "isa", "an instruction set of this CPU", isa);
  return *set;
}

WeightKind weight_kind(int64_t number) {
  check(number >= 0 && number < int64_t(std::size(kWeightKinds)), "weights", "the number of a kind", number);
  return static_cast<WeightKind>(number);
}

WeightKind weight_kind(const std::string& name) {
  const auto* found = std::find(std::begin(kWeightKinds), std::end(kWeightKinds), name);
  check(found != std::end(kWeightKinds), "weights", "whole, fresh, bf16x3, fresh bf16x3, bf16x3 stem or bf16",
        name);
  return weight_kind(found - std::begin(kWeightKinds));
}

const ConvKernel& conv_kernel(int64_t m, WeightKind weights, const std::string& isa, const ConvShape& shape,
                              bool bf16) {
  check(m == 0 || m == 2 || m == 4, "m", "0, 2 or 4", m);
  check(m == 0 || (shape.r == 3 && shape.s == 3), "weight", "a 3 x 3 filter for Winograd", shape.r, " x ",
        shape.s);
  const Kernels& set = kernels_called(isa);
  static constexpr ConvKernel kNone{};
  // [kind][direct, F2, F4]
  const ConvKernel* const all[][3] = {{&set.direct, &set.winograd2, &set.winograd4},
                                      {&kNone, &set.fresh_winograd2, &set.fresh_winograd4},
                                      {&set.bf16x3_direct, &set.bf16x3_winograd2, &set.bf16x3_winograd4},
                                      {&set.fresh_bf16x3_direct, &kNone, &kNone},
                                      {&kNone, &kNone, &kNone},
                                      {&kNone, &kNone, &kNone}};
  const ConvKernel* const all_bf16[][3] = {{&kNone, &set.bf16_winograd2, &set.bf16_winograd4},
                                           {&kNone, &set.bf16_fresh_winograd2, &set.bf16_fresh_winograd4},
                                           {&kNone, &kNone, &kNone},
                                           {&kNone, &kNone, &kNone},
                                           {&kNone, &kNone, &kNone},
                                           {&set.bf16_direct, &kNone, &kNone}};
  const ConvKernel& kernel = *(bf16 ? all_bf16 : all)[static_cast<size_t>(weights)][m / 2];
  check(kernel.run_piece != nullptr, "weights", "a kind that this kernel has", "\"",
        kWeightKinds[static_cast<size_t>(weights)], "\" for m = ", m, bf16 ? " and bfloat16" : "", " with ",
        set.isa);
  return kernel;
}

const PooledKernel& pooled_kernel(WeightKind weights, const std::string& isa, const ConvShape& shape) {
  const Kernels& set = kernels_called(isa);
  check(weights == WeightKind::kWhole || weights == WeightKind::kBf16x3Stem || weights == WeightKind::kBf16,
        "weights", "whole, bf16x3 stem or bf16 for a convolution with its max pool",
        kWeightKinds[static_cast<size_t>(weights)]);
  if (weights == WeightKind::kWhole) return set.pooled;
  if (weights == WeightKind::kBf16) {
    check(set.bf16_pooled.run != nullptr, "isa", "one with products of bfloat16", set.isa);
    return set.bf16_pooled;
  }
  check(set.bf16x3_stem.run != nullptr, "isa", "one with matrix tiles for bf16x3 stem", set.isa);
  check(set.bf16x3_stem.can_run(shape), "filter",
        "at most 16 channels, 32 inputs or more, no dilation and no stride beyond it for bf16x3 stem",
        shape.c, " channels, ", shape.r, " x ", shape.s);
  return set.bf16x3_stem;
}

}  // namespace fused_resnet::cpu
