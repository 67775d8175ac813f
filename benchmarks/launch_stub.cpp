// Stands for the CUDA runtime under the module _C_cuda (csrc/bindings_cuda.cpp and the planner, as they are):
// an H100 whose launches end here. See bench_launch_cost.py.
#include <torch/csrc/stable/ops.h>

#include "../csrc/cuda/launch.h"
#include "../csrc/cuda/plan.h"
#include "../csrc/cuda/workspace.h"

namespace fused_resnet {

int query_device(int, DeviceProperties& device, char*, int) {
  device.sm_count = 132;
  device.capability = 90;
  device.shared_bytes_per_block = 227 * 1024;
  device.shared_bytes_per_sm = 228 * 1024;
  return 0;
}

int use_device(int) {
  return 0;
}

int current_device() {
  return 0;
}

int launch_plan(const Plan&, const ConvParams& params, void*, char*, int) {
  asm volatile("" : : "r"(&params) : "memory");  // the launch that is left out reads the parameters
  return 0;
}

int check_addresses(const Plan&, const void* const*, char*, int) {
  return 0;
}

Workspace::Workspace(int64_t bytes, int64_t counter_bytes, int32_t, void*) {
  static char counters[kCounterAlignment];
  if (bytes == 0) return;
  partials_ = torch::stable::empty({(bytes - counter_bytes) / 4}, torch::headeronly::ScalarType::Float);
  counters_ = counters;
}

}  // namespace fused_resnet
