// Planning: a pure function from a problem and a device to everything one launch needs except addresses.
// No Torch, no CUDA, no allocation; all structs are plain data, also for the C API (c_api.cpp).
#pragma once

#include <cstdint>

#include "../conv_params.h"
#include "tensor_maps.h"
#include "tiles.h"

namespace fused_resnet {

constexpr int32_t kAbsent = -1;  // in place of a DType: there is no such tensor

// Which affine parameters a BN has.
enum Affine : int32_t { kAffineNone = 0, kAffineBoth = 1, kAffineWeight = 2, kAffineBias = 3 };

// Which kernels a request may get. A forced tile or split names one of the mma.sync family (and its twin on
// the FMA units), unless the request asks for the Hopper family by name.
enum Family : int32_t { kFamilyAny = 0, kFamilyMma = 1, kFamilyWgmma = 2 };

// The BN and the bias of one convolution.
struct NormRequest {
  int32_t bias_dtype = kAbsent;  // of the convolution's bias
  int32_t norm_dtype = kAbsent;  // of running_mean, running_var and the affine parameters; kAbsent: no BN
  int32_t affine = kAffineBoth;  // Affine
  float eps = 0;
};

struct PlanRequest {
  int32_t n = 1, h = 0, w = 0, c = 0, k = 0, r = 3, s = 3;
  int32_t stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0, dilation_h = 1, dilation_w = 1;
  int32_t groups = 1;
  int32_t dtype = kFloat16;  // of x and the weights
  int32_t tf32 = 0;          // 1: fp32 products may be rounded to tf32
  int32_t residual_dtype = kAbsent;
  int32_t activation = kActivationRelu;
  NormRequest norm;
  int32_t projection = 0;  // 1: proj_x [n, proj_h, proj_w, proj_c] passes a 1x1 convolution and is added
  int32_t proj_c = 0, proj_h = 0, proj_w = 0, proj_stride_h = 1, proj_stride_w = 1;
  NormRequest proj_norm;
  int32_t alignment = 16;  // bytes that the addresses of x, weights, residual and y are all multiples of
                           // (16 is enough)
  int32_t tile_m = 0, tile_n = 0;  // 0: the planner's choice
  int32_t splits = 0;              // 0: the planner's choice
  int32_t family = kFamilyAny;     // Family
  int32_t statistics =
      0;  // 1: y is the convolution alone (no BN, no activation), and mean and var are wanted
};

struct DeviceProperties {
  int32_t sm_count;
  int32_t capability;              // 80 for sm_80
  int32_t shared_bytes_per_block;  // the opt-in limit
  int32_t shared_bytes_per_sm;
  int32_t wgmma;  // 1: the Hopper family runs, as this build has code for sm_90a and the driver encodes
                  // tensor maps
};

// The tensors whose addresses a launch needs. Their names in Python and in launch.json: tensor_name().
enum TensorSlot : int32_t {
  kTensorX,
  kTensorWeight,
  kTensorBias,
  kTensorBnWeight,
  kTensorBnBias,
  kTensorRunningMean,
  kTensorRunningVar,
  kTensorProjX,
  kTensorProjWeight,
  kTensorProjBias,
  kTensorProjBnWeight,
  kTensorProjBnBias,
  kTensorProjRunningMean,
  kTensorProjRunningVar,
  kTensorResidual,
  kTensorY,
  kTensorWorkspace,
  kTensorMean,  // statistics of y, fp32
  kTensorVar,
  kTensorCount
};

// What the counters at the front of a workspace are rounded up to.
constexpr int64_t kCounterAlignment = 256;

struct KernelInfo {
  const char* symbol;
  int32_t tile_m, tile_n, depth_bytes, stages, threads;
  int32_t blocks_per_sm;  // that the registers allow
  int32_t shared_bytes;
  int32_t turing_shared_bytes;  // the same on sm_75; 0 where the kernel does not run there
  int32_t park_bytes;           // more, with a projection
  int32_t projection;           // 1: takes one
  Math math;
  Load load;
  Epilogue epilogue;
};

struct Plan {
  int32_t kernel;  // index into the catalogue
  int32_t grid[3], block[3];
  int32_t dynamic_shared_bytes;
  int64_t workspace_bytes;  // 0 where there is none
  int64_t
      counter_bytes;  // the first ones of the workspace: zero before the first launch, zero again after each
  int32_t
      alignment[kTensorCount];  // bytes each address must be a multiple of; 0: the launch has no such tensor
  ConvParams params;            // every address null
  TensorMapPlan maps[kMapCount];  // of the Hopper family's kernels: the parameters behind `params`
};

int kernel_count();
const KernelInfo& kernel_info(int index);
// Dynamic shared memory on a device of this capability, without a projection; 0 where the kernel does not run
// there.
inline int32_t shared_bytes_on(const KernelInfo& kernel, int capability) {
  return capability < 80 ? kernel.turing_shared_bytes : kernel.shared_bytes;
}
const char* tensor_name(int slot);
int64_t tensor_offset(int slot);  // bytes into ConvParams

// One sentence why this extension does not run the request on any device, or on this one; empty where it
// does. Returns 0 and the plan, or 1 and one sentence in `error`.
int make_plan(const PlanRequest& request, const DeviceProperties& device, Plan& plan, char* error,
              int error_bytes);

// The params of a launch at these addresses (by slot; null where there is no tensor).
ConvParams bind_addresses(const Plan& plan, const void* const* addresses);

}  // namespace fused_resnet
