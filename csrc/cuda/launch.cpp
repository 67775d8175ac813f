#include "launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdio>

#include "encode_maps.h"

// The host side of each kernel: its address names it to the CUDA runtime.
#define FUSED_RESNET_DECLARE_KERNEL(symbol, ...) extern "C" void symbol(fused_resnet::ConvParams);
FUSED_RESNET_KERNELS(FUSED_RESNET_DECLARE_KERNEL)
#define FUSED_RESNET_DECLARE_WGMMA_KERNEL(symbol, ...)                                               \
  extern "C" void symbol(fused_resnet::ConvParams, fused_resnet::TensorMap, fused_resnet::TensorMap, \
                         fused_resnet::TensorMap, fused_resnet::TensorMap);
FUSED_RESNET_WGMMA_KERNELS(FUSED_RESNET_DECLARE_WGMMA_KERNEL)

namespace fused_resnet {
namespace {

#define FUSED_RESNET_KERNEL_ADDRESS(symbol, ...) reinterpret_cast<const void*>(&::symbol),
const void* const kKernels[] = {FUSED_RESNET_KERNELS(FUSED_RESNET_KERNEL_ADDRESS)
                                    FUSED_RESNET_WGMMA_KERNELS(FUSED_RESNET_KERNEL_ADDRESS)};
constexpr int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

int failed(cudaError_t status, const char* what, char* error, int error_bytes) {
  cudaGetLastError();  // reported here, and by nothing that asks later
  std::snprintf(error, error_bytes, "cuda: %s: %s", what, cudaGetErrorString(status));
  return 1;
}

// A kernel must be allowed more than 48 KiB of dynamic shared memory once per device. Always as much as any
// plan of it takes there: of two threads, neither takes away what the other has just been allowed.
constexpr int kDevices = 64;
std::atomic<bool> allowed_shared[kDevices][kKernelCount];

cudaError_t allow_shared(int kernel) {
  const KernelInfo& info = kernel_info(kernel);
  const int most = info.shared_bytes + info.park_bytes;
  if (most <= 48 * 1024) return cudaSuccess;
  int device = 0, limit = 0;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  const bool remembered = device < kDevices;
  if (remembered && allowed_shared[device][kernel].load(std::memory_order_relaxed)) return cudaSuccess;
  if (const cudaError_t status =
          cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return status;
  }
  const cudaError_t status = cudaFuncSetAttribute(
      kKernels[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize, std::min(most, limit));
  if (remembered && status == cudaSuccess)
    allowed_shared[device][kernel].store(true, std::memory_order_relaxed);
  return status;
}

}  // namespace

int query_device(int index, DeviceProperties& device, char* error, int error_bytes) {
  int major = 0, minor = 0;
  cudaError_t status = index < 0 ? cudaGetDevice(&index) : cudaSuccess;
  const auto read = [&](int32_t& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, index);
  };
  read(device.sm_count, cudaDevAttrMultiProcessorCount);
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(device.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(device.shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.capability = major * 10 + minor;
  device.wgmma = device.capability == 90 && kHopperCode && maps_can_be_encoded();
  return status == cudaSuccess ? 0 : failed(status, "reading the device's properties", error, error_bytes);
}

int use_device(int device) {
  return cudaSetDevice(device) == cudaSuccess ? 0 : 1;
}

int current_device() {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

int launch_plan(const Plan& plan, const ConvParams& params, void* stream, char* error, int error_bytes) {
  if (plan.grid[0] == 0) return 0;
  if (const cudaError_t status = allow_shared(plan.kernel)) {
    return failed(status, "allowing the kernel's shared memory", error, error_bytes);
  }
  const dim3 grid(plan.grid[0], plan.grid[1], plan.grid[2]),
      block(plan.block[0], plan.block[1], plan.block[2]);
  TensorMap maps[kMapCount];
  void* arguments[1 + kMapCount] = {const_cast<ConvParams*>(&params)};
  for (int i = 0; i < kMapCount; ++i) {
    if (encode_map(plan.maps[i], params, maps[i], error, error_bytes)) return 1;
    arguments[1 + i] = &maps[i];
  }
  const cudaError_t status = cudaLaunchKernel(kKernels[plan.kernel], grid, block, arguments,
                                              plan.dynamic_shared_bytes, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) return failed(status, kernel_info(plan.kernel).symbol, error, error_bytes);
  return 0;
}

int check_slots(const int32_t* alignment, const char* const* names, int count, bool launches,
                const void* const* addresses, char* error, int error_bytes) {
  for (int slot = 0; slot < count; ++slot) {
    const auto address = reinterpret_cast<uintptr_t>(addresses[slot]);
    if (alignment[slot] == 0 && address != 0) {
      std::snprintf(error, error_bytes, "%s: expected no address, the plan has no such tensor", names[slot]);
      return 1;
    }
    if (alignment[slot] > 0 && (address == 0 || address % alignment[slot] != 0) && launches) {
      std::snprintf(error, error_bytes, "%s: expected an address that is a multiple of %d, got 0x%llx",
                    names[slot], alignment[slot], static_cast<unsigned long long>(address));
      return 1;
    }
  }
  return 0;
}

int check_addresses(const Plan& plan, const void* const* addresses, char* error, int error_bytes) {
  const char* names[kTensorCount];
  for (int slot = 0; slot < kTensorCount; ++slot) names[slot] = tensor_name(slot);
  return check_slots(plan.alignment, names, kTensorCount, plan.grid[0] > 0, addresses, error, error_bytes);
}

}  // namespace fused_resnet
