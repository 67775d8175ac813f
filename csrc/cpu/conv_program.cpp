// fused_resnet_C::conv_program: one or many convolutions in one call.
//
// Between two convolutions of a network everything that is not a convolution comes from memory: its data has
// pushed the interpreter, the dispatcher and their objects out of the caches, and a call that takes 20
// microseconds in a loop takes 80 there. So a whole network can be one call, with few arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <utility>
#include <vector>

#include "conv_ops.h"
#include "weight_checksum.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kNothing = -1;  // in place of the number of a link
constexpr int64_t input_number(int64_t place) {
  return -2 - place;
}  // -2 is the first input

// One convolution, as fused_resnet/backends/cpu_program.py writes it: int64 throughout.
struct Link {
  int64_t source, residual;  // the link whose output is read (added), an input, or kNothing
  int64_t m, weights, k, r, s;
  int64_t stride[2], padding[2], dilation[2];
  int64_t activation;
  int64_t present;   // bits: bias, bn_weight, bn_bias, running_mean, running_var
  double eps;        // its bits
  int64_t pool[6];   // of the max pool behind it: window, stride, padding; zeros without one
  int64_t returned;  // whether its output is one of the results
};
static_assert(sizeof(Link) == 23 * sizeof(int64_t), "as cpu_program.py writes it");

template <size_t N>
std::vector<int64_t> list(const int64_t (&numbers)[N]) {
  return {numbers, numbers + N};
}

// The tensors of a program in the order in which its links name them.
class Operands {
 public:
  explicit Operands(const std::vector<Tensor>& tensors) : tensors_(tensors) {}
  const Tensor& take() {
    check(next_ < tensors_.size(), "tensors", "all that the program names", tensors_.size());
    return tensors_[next_++];
  }

 private:
  const std::vector<Tensor>& tensors_;
  size_t next_ = 0;
};

// For each link the last one that reads its output, after which that is given back: at large batches all
// outputs would be gigabytes.
std::vector<int64_t> last_uses(const Link* links, int64_t count, int64_t inputs) {
  std::vector<int64_t> last_use(count, count);
  for (int64_t i = 0; i < count; ++i) {
    check(links[i].source != kNothing, "program", "an input or an earlier link to read", "nothing");
    for (const int64_t place : {links[i].source, links[i].residual}) {
      check(place < i && place > input_number(inputs), "program", "the number of an input or an earlier link",
            place);
      if (place >= 0) last_use[place] = i;
    }
  }
  return last_use;
}

// `tensors`: for each link its packed weight, with `checked` the checksum of its weight and the weight, and
// the vectors that are present. Returns the outputs that are asked for, in the order of the links; nothing,
// where a weight is no longer what its copy was packed from.
std::vector<Tensor> conv_program(const std::vector<Tensor>& inputs, const std::vector<Tensor>& tensors,
                                 const Tensor& program, bool checked) {
  check(program.scalar_type() == ScalarType::Long && program.dim() == 2 && program.is_contiguous() &&
            program.size(1) * sizeof(int64_t) == sizeof(Link),
        "program", "a row of numbers for each convolution", shape_of(program));
  const auto* links = static_cast<const Link*>(program.const_data_ptr());
  const int64_t count = program.size(0);
  const std::vector<int64_t> last_use = last_uses(links, count, static_cast<int64_t>(inputs.size()));
  std::vector<OptionalTensor> outputs(count);
  const auto made = [&](int64_t place) -> const Tensor& {
    return place >= 0 ? *outputs[place] : inputs[input_number(place)];
  };
  Operands operands(tensors);
  std::vector<Tensor> results;
  for (int64_t i = 0; i < count; ++i) {
    const Link& link = links[i];
    const Tensor& packed = operands.take();
    if (checked) {
      const Tensor& taken = operands.take();
      if (!checksum_holds(taken, operands.take())) return {};
    }
    OptionalTensor vectors[5];
    for (int v = 0; v < 5; ++v) {
      if (link.present >> v & 1) vectors[v] = operands.take();
    }
    const BatchNormArguments bn{vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], link.eps};
    if (link.pool[0] != 0) {
      outputs[i] = pooled_convolution(made(link.source), packed, {link.k, link.r, link.s}, "",
                                      list(link.stride), list(link.padding), list(link.dilation), bn,
                                      link.activation, list(link.pool), weight_kind(link.weights));
    } else {
      const OptionalTensor residual =
          link.residual == kNothing ? std::nullopt : OptionalTensor(made(link.residual));
      outputs[i] = fused_convolution(made(link.source), packed, {link.k, link.r, link.s}, link.m, "",
                                     list(link.stride), list(link.padding), list(link.dilation), bn, residual,
                                     link.activation, weight_kind(link.weights));
    }
    if (link.returned) results.push_back(*outputs[i]);
    for (const int64_t place : {link.source, link.residual}) {
      if (place >= 0 && last_use[place] == i) outputs[place].reset();
    }
  }
  return results;
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("conv_program", TORCH_BOX(&fused_resnet::cpu::conv_program));
}
