#include "workspace.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>

#include "memory.h"

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kKept = int64_t{128}
                          << 20;  // bytes per thread: a ResNet-50's three largest outputs at batch 8

}  // namespace

Workspace& Workspace::mine() {
  thread_local Workspace workspace;
  return workspace;
}

Tensor Workspace::take(int64_t n, int64_t k, int64_t p, int64_t q) {
  const int64_t bytes = Extent(std::max<int64_t>(1, n * k * p * q * int64_t(sizeof(float)))).bytes;
  Buffer* best = nullptr;
  for (Buffer& buffer : buffers_) {
    if (!buffer.taken && buffer.bytes >= bytes && (best == nullptr || buffer.bytes < best->bytes))
      best = &buffer;
  }
  if (best == nullptr) {
    buffers_.push_back({{static_cast<float*>(allocate(bytes)), std::free}, bytes, false});
    best = &buffers_.back();
  }
  best->taken = true;
  const int64_t sizes[4] = {n, k, p, q}, strides[4] = {p * q * k, 1, q * k, k};
  return torch::stable::from_blob(best->memory.get(), {sizes, 4}, {strides, 4},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float);
}

void Workspace::give_back(const Tensor& taken) {
  for (Buffer& buffer : buffers_) {
    if (buffer.memory.get() == taken.const_data_ptr()) buffer.taken = false;
  }
}

void Workspace::give_back_all() {
  int64_t kept = 0;
  for (Buffer& buffer : buffers_) buffer.taken = false, kept += buffer.bytes;
  if (kept > kKept) buffers_.clear();
}

}  // namespace fused_resnet::cpu
