// fused_resnet_C::snapshot and unchanged: what the weight cache remembers of a weight and of the vectors
// folded into it, and the comparison that it makes on each call (a few hundred nanoseconds).
//
// A snapshot is bytes: 64 elements of the weight, evenly strided over it from the first to the last, then
// each vector in full, after one byte that tells its presence. Bytes rather than numbers, so that NaN equals
// itself.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "samples.h"
#include "tensors.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;

// Calls visit(pointer, bytes) for every run of bytes that a snapshot holds, until it returns false.
template <class Visit>
bool visit_bytes(const Tensor& weight, const OptionalTensor* vectors, Visit&& visit) {
  const int64_t item = static_cast<int64_t>(weight.element_size());
  const auto* data = static_cast<const unsigned char*>(weight.const_data_ptr());
  // All addresses first, so that their cache misses and page walks overlap.
  const unsigned char* samples[kSamples];
  int64_t count = 0;
  for_each_sample(weight, [&](int64_t offset) {
    samples[count++] = data + offset;
    __builtin_prefetch(data + offset);
  });
  for (int64_t i = 0; i < count; ++i) {
    if (!visit(samples[i], item)) return false;
  }
  for (int v = 0; v < 5; ++v) {
    const unsigned char present = vectors[v].has_value();
    if (!visit(&present, int64_t{1})) return false;
    if (!present) continue;
    const Tensor& vector = *vectors[v];
    const int64_t bytes = static_cast<int64_t>(vector.element_size());
    const auto* from = static_cast<const unsigned char*>(vector.const_data_ptr());
    if (vector.is_contiguous()) {
      if (!visit(from, vector.numel() * bytes)) return false;
      continue;
    }
    for (int64_t i = 0; i < vector.numel(); ++i) {
      if (!visit(from + i * vector.stride(0) * bytes, bytes)) return false;
    }
  }
  return true;
}

Tensor snapshot(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
                const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                const OptionalTensor& running_var) {
  const OptionalTensor vectors[5] = {bias, bn_weight, bn_bias, running_mean, running_var};
  int64_t total = 0;
  visit_bytes(weight, vectors, [&](const unsigned char*, int64_t bytes) { return total += bytes, true; });
  Tensor taken = torch::stable::empty({total}, ScalarType::Byte);
  auto* to = static_cast<unsigned char*>(taken.mutable_data_ptr());
  visit_bytes(weight, vectors, [&](const unsigned char* from, int64_t bytes) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return to += bytes, true;
  });
  return taken;
}

bool unchanged(const Tensor& snapshot, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
               const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  const OptionalTensor vectors[5] = {bias, bn_weight, bn_bias, running_mean, running_var};
  const auto* taken = static_cast<const unsigned char*>(snapshot.const_data_ptr());
  int64_t left = snapshot.numel();
  const bool same = visit_bytes(weight, vectors, [&](const unsigned char* now, int64_t bytes) {
    if (left < bytes || std::memcmp(taken, now, static_cast<size_t>(bytes)) != 0) return false;
    taken += bytes;
    left -= bytes;
    return true;
  });
  return same && left == 0;
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("snapshot", TORCH_BOX(&fused_resnet::cpu::snapshot));
  m.impl("unchanged", TORCH_BOX(&fused_resnet::cpu::unchanged));
}
