// Samples of a weight: what tells that it has been written to since a copy of it was packed.
#pragma once

#include "tensors.h"

namespace fused_resnet::cpu {

// Calls use(byte offset) for each of the 64 elements that stand for a weight: evenly strided over it in its
// logical order, the first and the last among them. None where it is empty.
constexpr int64_t kSamples = 64;
template <class Use>
void for_each_sample(const Tensor& weight, Use&& use) {
  const int64_t item = static_cast<int64_t>(weight.element_size()), count = weight.numel();
  const auto sizes = weight.sizes(), strides = weight.strides();
  for (int64_t i = 0; i < kSamples && count > 0; ++i) {
    int64_t index = count == 1 ? 0 : i * (count - 1) / (kSamples - 1), offset = 0;
    for (int64_t dim = weight.dim() - 1; dim >= 0; --dim) {
      offset += index % sizes[dim] * strides[dim];
      index /= sizes[dim];
    }
    use(offset * item);
  }
}

// The samples of a 4-d float32 weight as fused_resnet_C::samples took them, with their places: finding those
// costs more divisions than the comparison has loads.
class Samples {
 public:
  static Tensor take(const Tensor& weight);

  explicit Samples(const Tensor& taken);

  // Starts loading the samples, so that their cache misses and page walks overlap with other work.
  void prefetch() const;
  // Whether `weight` has the memory, sizes, strides and samples of that time; bits are compared, so NaN
  // equals itself.
  bool hold(const Tensor& weight) const;

 private:
  struct Taken {
    const unsigned char* data;
    int64_t sizes[4], strides[4];
    int64_t offsets[kSamples];
    uint32_t values[kSamples];
  };
  const Taken* taken_;
};

}  // namespace fused_resnet::cpu
