#include "bn_launch.h"

#include <cuda_runtime_api.h>

#include <cstdio>

#include "launch.h"

#define FUSED_RESNET_DECLARE_BN_KERNEL(symbol, ...) extern "C" void symbol(fused_resnet::BnParams);
FUSED_RESNET_BN_KERNELS(FUSED_RESNET_DECLARE_BN_KERNEL)

namespace fused_resnet {
namespace {

#define FUSED_RESNET_BN_KERNEL_ADDRESS(symbol, ...) reinterpret_cast<const void*>(&::symbol),
const void* const kKernels[] = {FUSED_RESNET_BN_KERNELS(FUSED_RESNET_BN_KERNEL_ADDRESS)};

}  // namespace

int launch_bn_plan(const BnPlan& plan, const BnParams& params, void* stream, char* error, int error_bytes) {
  if (plan.grid[0] == 0) return 0;
  const dim3 grid(plan.grid[0], plan.grid[1], plan.grid[2]),
      block(plan.block[0], plan.block[1], plan.block[2]);
  void* arguments[] = {const_cast<BnParams*>(&params)};
  const cudaError_t status = cudaLaunchKernel(kKernels[plan.kernel], grid, block, arguments,
                                              plan.dynamic_shared_bytes, static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return 0;
  cudaGetLastError();  // reported here, and by nothing that asks later
  std::snprintf(error, error_bytes, "cuda: %s: %s", bn_kernel_info(plan.kernel).symbol,
                cudaGetErrorString(status));
  return 1;
}

int check_bn_addresses(const BnPlan& plan, const void* const* addresses, char* error, int error_bytes) {
  const int pass = static_cast<int>(bn_kernel_info(plan.kernel).pass);
  const char* names[kBnTensorCount];
  for (int slot = 0; slot < kBnTensorCount; ++slot) names[slot] = bn_tensor_name(pass, slot);
  return check_slots(plan.alignment, names, kBnTensorCount, plan.grid[0] > 0, addresses, error, error_bytes);
}

}  // namespace fused_resnet
