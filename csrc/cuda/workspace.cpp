#include "workspace.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "counters.h"
#include "tensors.h"
#include "torch_device.h"

namespace fused_resnet {

Workspace::Workspace(int64_t bytes, int64_t counter_bytes, int32_t device, void* stream) {
  if (bytes == 0) return;
  const torch::stable::Device on(kDeviceType, static_cast<torch::stable::DeviceIndex>(device));
  partials_ = torch::stable::empty({(bytes - counter_bytes) / 4}, torch::headeronly::ScalarType::Float,
                                   std::nullopt, on);
  char error[kErrorBytes];
  counters_ = counters_for(counter_bytes, device, stream, error, kErrorBytes);
  if (counters_ == nullptr) throw std::runtime_error(error);
  partials_offset_ =
      reinterpret_cast<intptr_t>(partials_->data_ptr()) - reinterpret_cast<intptr_t>(counters_);
}

}  // namespace fused_resnet
