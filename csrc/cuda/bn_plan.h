// Planning of the training passes: a pure function from a problem and a device to everything one launch needs
// except addresses, as plan.h for the convolutions. No Torch, no CUDA.
#pragma once

#include <cstdint>

#include "../bn_params.h"
#include "bn_kernels.h"
#include "plan.h"

namespace fused_resnet {

struct BnRequest {
  int64_t rows = 0;  // N * H * W
  int32_t channels = 0;
  int32_t pass = 0;  // BnPass
  int32_t y_dtype = kFloat32;
  int32_t proj_dtype = kAbsent;          // of the projection's y; kAbsent: no projection
  int32_t residual_dtype = kAbsent;      // apply: of the residual; backward apply: of its gradient; kAbsent:
                                         // none, or not wanted
  int32_t out_dtype = kFloat32;          // apply: of the activation; backward: of grad_out
  int32_t activation = kActivationNone;  // apply
  int32_t mask = 0;                      // 1: apply writes it, the backward passes read it
  int32_t affine = kAffineNone, proj_affine = kAffineNone;
  int32_t alignment = 16;  // bytes that the addresses of all activations are multiples of (16 is enough)
  int32_t reserved = 0;
};

// The tensors whose addresses a launch may need. Their names depend on the pass: bn_tensor_name().
enum BnTensorSlot : int32_t {
  kBnY,
  kBnMean,
  kBnInvstd,
  kBnWeight,
  kBnBias,
  kBnMeanDz,
  kBnMeanDzXhat,
  kBnProjY,
  kBnProjMean,
  kBnProjInvstd,
  kBnProjWeight,
  kBnProjBias,
  kBnProjMeanDz,
  kBnProjMeanDzXhat,
  kBnResidual,
  kBnGradOut,
  kBnOut,
  kBnSecond,
  kBnMask,
  kBnResult0,
  kBnResult1,
  kBnResult2,
  kBnWorkspace,
  kBnTensorCount
};
constexpr int kBnBranchTensors = kBnProjY - kBnY;

struct BnKernelInfo {
  const char* symbol;
  BnPass pass;
  int32_t packet, dtype, branches, blocks_per_sm, shared_bytes;
};

struct BnPlan {
  int32_t kernel;  // index into the catalogue
  int32_t grid[3], block[3];
  int32_t dynamic_shared_bytes;
  int64_t workspace_bytes, counter_bytes;  // as in Plan
  int32_t alignment[kBnTensorCount];       // bytes; 0: the launch has no such tensor
  int32_t reserved;
  BnParams params;  // every address null
};

int bn_kernel_count();
const BnKernelInfo& bn_kernel_info(int index);
const char* bn_tensor_name(int pass, int slot);  // no two of a pass are equal
int64_t bn_tensor_offset(int slot);              // bytes into BnParams

// Returns 0 and the plan, or 1 and one sentence in `error`.
int make_bn_plan(const BnRequest& request, const DeviceProperties& device, BnPlan& plan, char* error,
                 int error_bytes);

// The params of a launch at these addresses (by slot; null where there is no tensor).
BnParams bind_bn_addresses(const BnPlan& plan, const void* const* addresses);

}  // namespace fused_resnet
