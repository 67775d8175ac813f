// The memory in which the blocks of one launch meet: split-K, and the reductions of the training passes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fused_resnet {

// At least `bytes`, the first `counter_bytes` of them zeroed, for one launch on `stream` of `device`. Every
// launch leaves the counters zero, so all launches on one stream share one workspace, zeroed once. While
// `stream` is being captured it is a new one from the graph's memory, zeroed within the graph: replays may
// run beside anything.
torch::stable::Tensor workspace_for(int64_t bytes, int64_t counter_bytes, int32_t device, void* stream);

}  // namespace fused_resnet
