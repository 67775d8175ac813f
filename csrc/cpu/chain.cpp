// fused_resnet_C::conv_chain: the convolutions of a network in one call, their weights checked on the way.
//
// Between two convolutions of a network everything that is not a convolution comes from memory: its data has
// pushed the interpreter, the dispatcher and their objects out of the caches, and a call that takes 20
// microseconds in a loop takes 80 there. So there is one call, with few arguments.
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

constexpr int64_t kInput = -1, kNothing = -2, kAdded = -3;  // in place of the number of a link

// One convolution of a chain, as fused_resnet/backends/chain.py writes it: int64 throughout.
struct Link {
  int64_t source, residual;  // the link whose output is read (added), or kInput, kAdded or kNothing
  int64_t m, weights, k, r, s;
  int64_t stride[2], padding[2], dilation[2];
  int64_t activation;
  int64_t present;  // bits: bias, bn_weight, bn_bias, running_mean, running_var
  double eps;       // its bits
  int64_t pool[6];  // of the max pool behind it: window, stride, padding; zeros without one
};
static_assert(sizeof(Link) == 22 * sizeof(int64_t), "as chain.py writes it");

template <size_t N>
std::vector<int64_t> list(const int64_t (&numbers)[N]) {
  return {numbers, numbers + N};
}

// `tensors`: for each link its packed weight, the samples of its weight, the weight, and the vectors that are
// present. Returns the last output, or nothing where a weight is no longer what its copy was packed from.
// `added` is a second input, the residual or what a projection reads.
OptionalTensor conv_chain(const Tensor& x, const std::vector<Tensor>& tensors, const Tensor& program,
                          const OptionalTensor& added) {
  check(program.scalar_type() == ScalarType::Long && program.dim() == 2 && program.is_contiguous() &&
            program.size(1) * sizeof(int64_t) == sizeof(Link),
        "program", "a row of numbers for each convolution", shape_of(program));
  const auto* links = static_cast<const Link*>(program.const_data_ptr());
  const int64_t count = program.size(0);
  check(count > 0, "program", "at least one convolution", count);
  // The last link that reads each output, for which it is kept: at large batches all of them would be
  // gigabytes.
  std::vector<int64_t> last_use(count, count);
  for (int64_t i = 0; i < count; ++i) {
    for (const int64_t place : {links[i].source, links[i].residual}) {
      check(place >= kAdded && place < i && links[i].source != kNothing, "program",
            "the number of an earlier link", place);
      check(place != kAdded || added.has_value(), "added", "a tensor, since the program names it", "none");
      if (place >= 0) last_use[place] = i;
    }
  }
  std::vector<OptionalTensor> outputs(count);
  const auto made = [&](int64_t place) -> const Tensor& {
    return place == kInput ? x : place == kAdded ? *added : *outputs[place];
  };
  // Everything but the last output; given back also where an argument is refused.
  struct Lease {
    Workspace& workspace = Workspace::mine();
    ~Lease() { workspace.give_back_all(); }
  } lease;
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
    Workspace* const workspace = i + 1 < count ? &lease.workspace : nullptr;
    const BatchNormArguments bn{vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], link.eps};
    if (link.pool[0] != 0) {
      outputs[i] =
          pooled_convolution(made(link.source), packed, {link.k, link.r, link.s}, "", list(link.stride),
                             list(link.padding), list(link.dilation), bn, link.activation, list(link.pool),
                             weight_kind(link.weights), &samples, &weight, workspace);
    } else {
      const OptionalTensor residual =
          link.residual == kNothing ? std::nullopt : OptionalTensor(made(link.residual));
      outputs[i] =
          fused_convolution(made(link.source), packed, {link.k, link.r, link.s}, link.m, "",
                            list(link.stride), list(link.padding), list(link.dilation), bn, residual,
                            link.activation, weight_kind(link.weights), &samples, &weight, workspace);
    }
    if (!outputs[i].has_value()) return std::nullopt;
    for (const int64_t place : {link.source, link.residual}) {
      if (place >= 0 && last_use[place] == i && outputs[place].has_value()) {
        lease.workspace.give_back(*outputs[place]);
        outputs[place].reset();
      }
    }
  }
  return std::move(outputs.back());
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("conv_chain", TORCH_BOX(&fused_resnet::cpu::conv_chain));
}
