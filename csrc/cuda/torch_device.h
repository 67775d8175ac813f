// What operator and workspace ask of torch about the device. tests/support/cuda_operator/ supplies another
// file of this name, so that both run, otherwise unchanged, on CPU tensors above a stand-in for the CUDA
// runtime.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "launch.h"

// Exists only in libtorch_cuda. Weak, so that the planner is there with a CPU-only torch too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

#define FUSED_RESNET_DISPATCH_KEY CUDA

namespace fused_resnet {

constexpr auto kDeviceType = torch::headeronly::DeviceType::CUDA;

inline bool on_device(const torch::stable::Tensor& t) {
  return t.is_cuda();
}
inline int32_t device_index(const torch::stable::Tensor& t) {
  return t.get_device_index();
}

// Makes a device current for torch and for our CUDA runtime; torch's own guard restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) : guard_(index) {
    if (use_device(index) != 0) throw std::runtime_error("cuda: cudaSetDevice failed");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void* current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace fused_resnet
