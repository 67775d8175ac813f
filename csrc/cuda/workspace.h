// The memory in which the blocks of a split-K launch meet.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "plan.h"

namespace fused_resnet {

// At least plan.workspace_bytes with zeroed counters, for one launch of `plan` on `stream` of `device`. Every
// launch leaves the counters zero, so all launches on one stream share one workspace, zeroed once. While
// `stream` is being captured it is a new one from the graph's memory, zeroed within the graph: replays may
// run beside anything.
torch::stable::Tensor workspace_for(const Plan& plan, int32_t device, void* stream);

}  // namespace fused_resnet
