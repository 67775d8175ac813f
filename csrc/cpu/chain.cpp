// fused_resnet_C::conv_chain: the convolutions of a residual block in one call, their weights checked on the
// way.
//
// Between two convolutions of a network everything that is not a convolution comes from memory: its data has
// pushed the interpreter, the dispatcher and their objects out of the caches, and a call that takes 20
// microseconds in a loop takes 80 there. So a block makes one call, with few arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <utility>
#include <vector>

#include "conv_ops.h"
#include "samples.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kInput = -1, kNothing = -2;  // in place of the number of a link

// One convolution of a chain, as fused_resnet/backends/chain.py writes it: int64 throughout.
struct Link {
  int64_t source, residual;  // the link whose output is read (added), or kInput, or kNothing
  int64_t m, fresh, k, r, s;
  int64_t stride[2], padding[2], dilation[2];
  int64_t activation;
  int64_t present;  // bits: bias, bn_weight, bn_bias, running_mean, running_var
  double eps;       // its bits
};
static_assert(sizeof(Link) == 16 * sizeof(int64_t), "as chain.py writes it");

std::vector<int64_t> list(const int64_t (&two)[2]) {
  return {two[0], two[1]};
}

// `tensors`: for each link its packed weight, the samples of its weight, the weight, and the vectors that are
// present. Returns the last output, or nothing where a weight is no longer what its copy was packed from.
OptionalTensor conv_chain(const Tensor& x, const std::vector<Tensor>& tensors, const Tensor& program) {
  check(program.scalar_type() == ScalarType::Long && program.dim() == 2 && program.is_contiguous() &&
            program.size(1) * sizeof(int64_t) == sizeof(Link),
        "program", "a row of numbers for each convolution", shape_of(program));
  const auto* links = static_cast<const Link*>(program.const_data_ptr());
  const int64_t count = program.size(0);
  std::vector<Tensor> outputs;
  outputs.reserve(count);
  const auto made = [&](int64_t place) -> const Tensor& {
    check(place >= kInput && place < int64_t(outputs.size()), "program", "the number of an earlier link",
          place);
    return place == kInput ? x : outputs[place];
  };
  size_t next = 0;
  const auto take = [&]() -> const Tensor& {
    check(next < tensors.size(), "tensors", "all that the program names", tensors.size());
    return tensors[next++];
  };
  for (int64_t i = 0; i < count; ++i) {
    const Link& link = links[i];
    const Tensor& packed = take();
    const Samples samples(take());
    const Tensor& weight = take();
    OptionalTensor vectors[5];
    for (int v = 0; v < 5; ++v) {
      if (link.present >> v & 1) vectors[v] = take();
    }
    const OptionalTensor residual =
        link.residual == kNothing ? std::nullopt : OptionalTensor(made(link.residual));
    OptionalTensor y =
        fused_convolution(made(link.source), packed, {link.k, link.r, link.s}, link.m, "", list(link.stride),
                          list(link.padding), list(link.dilation),
                          {vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], link.eps}, residual,
                          link.activation, link.fresh != 0, &samples, &weight);
    if (!y.has_value()) return std::nullopt;
    outputs.push_back(std::move(*y));
  }
  check(!outputs.empty(), "program", "at least one convolution", count);
  return outputs.back();
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("conv_chain", TORCH_BOX(&fused_resnet::cpu::conv_chain));
}
