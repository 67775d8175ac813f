// Stands in for csrc/cuda/torch_device.h: CPU tensors are "on the device", and the CUDA runtime is a stand-in
// too.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "launch.h"

#define FUSED_RESNET_DISPATCH_KEY CPU

namespace fused_resnet {

constexpr auto kDeviceType = torch::headeronly::DeviceType::CPU;

inline bool on_device(const torch::stable::Tensor& t) {
  return t.is_cpu();
}
inline int32_t device_index(const torch::stable::Tensor&) {
  return 0;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) { use_device(index); }
};

extern void* stream_of_the_tests;  // tests/cuda/test_cuda_operator.py
inline void* current_stream(int32_t) {
  return stream_of_the_tests;
}

}  // namespace fused_resnet
