// Executes a plan of a training pass on raw addresses. Uses the CUDA runtime, but no Torch.
#pragma once

#include "bn_plan.h"

namespace fused_resnet {

// As launch_plan: returns at once, launches nothing for an empty grid, may be captured into a CUDA graph.
// Returns 0, or 1 and one sentence in `error`.
int launch_bn_plan(const BnPlan& plan, const BnParams& params, void* stream, char* error, int error_bytes);

// Every address the plan needs is there and aligned, and no other one.
int check_bn_addresses(const BnPlan& plan, const void* const* addresses, char* error, int error_bytes);

}  // namespace fused_resnet
