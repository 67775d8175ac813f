// What the operators need to know of torch's tensors and devices, in the planner's terms.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "plan.h"

namespace fused_resnet {

constexpr int kErrorBytes = 512;

// The planner's code of a tensor's dtype; `name` is the argument's, for the refusal.
int32_t dtype_of(const torch::stable::Tensor& t, const char* name);
torch::headeronly::ScalarType scalar_type(int32_t dtype);

// Whether element (n, c, h, w) lies at ((n * H + h) * W + w) * C + c.
bool dense_channels_last(const torch::stable::Tensor& t);

void check_same_device(const torch::stable::Tensor& t, const torch::stable::Tensor& x, const char* name);

// Asked of the driver once per device.
const DeviceProperties& properties(int32_t device);

// The plan of a request on a device, remembered per thread. Requests are plain data without padding.
template <class Request, class Plan>
const Plan& remembered_plan(const Request& request, int32_t device,
                            int (*make)(const Request&, const DeviceProperties&, Plan&, char*, int)) {
  thread_local std::unordered_map<std::string, Plan> plans;
  std::string key(reinterpret_cast<const char*>(&request), sizeof(request));
  key.append(reinterpret_cast<const char*>(&device), sizeof(device));
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  Plan plan;
  char error[kErrorBytes];
  if (make(request, properties(device), plan, error, kErrorBytes)) throw std::invalid_argument(error);
  if (plans.size() >= 1024) plans.clear();
  return plans.emplace(key, plan).first->second;
}

}  // namespace fused_resnet
