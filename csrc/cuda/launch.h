// Executes a plan on raw addresses. Uses the CUDA runtime, but no Torch.
#pragma once

#include "plan.h"

namespace fused_resnet {

// Properties of a device (-1: of the current one); returns 0, or 1 and one sentence in `error`.
int query_device(int index, DeviceProperties& device, char* error, int error_bytes);

// Makes `device` the current one of this runtime: the statically linked one is not torch's. Returns 0, or 1.
int use_device(int device);
// The current device, or -1.
int current_device();

// Launches on `stream` of the current device and returns at once; nothing is launched for an empty grid. Only
// kernel launches reach the stream, so this may be captured into a CUDA graph. Returns 0, or 1 and one
// sentence in `error`.
int launch_plan(const Plan& plan, const ConvParams& params, void* stream, char* error, int error_bytes);

// The checks that launch_plan leaves out: every address the plan needs is there, and aligned.
int check_addresses(const Plan& plan, const void* const* addresses, char* error, int error_bytes);
// The same for any list of tensors: their alignments (0: expected to be absent) and names.
int check_slots(const int32_t* alignment, const char* const* names, int count, bool launches,
                const void* const* addresses, char* error, int error_bytes);

}  // namespace fused_resnet
