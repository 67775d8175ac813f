// Where the blocks of a launch count their arrivals. Uses the CUDA runtime, but no Torch.
#pragma once

#include <cstdint>

namespace fused_resnet {

// The address of `bytes` of counters for one launch on `stream` of the current device, whose index is
// `device`; or null, and one sentence in `error`.
//
// They are zeroed where memory is allocated and never again: every launch leaves them zero (arrival.cuh). So
// the launches on one stream share theirs, whereas each launch that is captured gets its own, until its graph
// is gone: graphs may be replayed beside anything. They do not come from torch's allocator, since what
// outlives a call must not lie in the pool of a graph. A kernel that dies in the middle leaves them dirty,
// but such an error ends the CUDA context and with it all memory.
void* counters_for(int64_t bytes, int32_t device, void* stream, char* error, int error_bytes);

}  // namespace fused_resnet
