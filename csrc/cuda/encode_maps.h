// Tensor maps at the addresses of one launch, by the driver. Uses the CUDA runtime, but no Torch, and links
// against no libcuda: the driver's functions are looked up where they are first needed.
#pragma once

#include "plan.h"
#include "tensor_map.h"

namespace fused_resnet {

// Whether the kernels of the Hopper family in this build are more than empty functions
// (kernels_wgmma_f16.cu).
extern const bool kHopperCode;

// Whether the driver has the functions.
bool maps_can_be_encoded();

// The map of `plan` for the address that `params` has in its slot; zeros where there is none. A map says only
// where a tensor lies and what shape it has, so one that was encoded before serves again, whatever has since
// happened to the memory; each thread keeps its latest. Host work alone: it may happen inside of a capture,
// and a graph keeps the bytes as the kernel's parameters. Returns 0, or 1 and one sentence in `error`.
int encode_map(const TensorMapPlan& plan, const ConvParams& params, TensorMap& map, char* error,
               int error_bytes);

}  // namespace fused_resnet
