// The memory in which the blocks of one launch meet: split-K, and the reductions of the training passes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace fused_resnet {

// The workspace of one launch on `stream` of `device`, torch's current ones; it must live until the launch is
// on the stream. Counters come from counters.h. Partial results are torch's memory for this launch alone:
// inside of a capture they belong to the graph, and nothing stays behind in its pool.
class Workspace {
 public:
  // Nothing where there are no bytes; `counter_bytes` of them are counters.
  Workspace(int64_t bytes, int64_t counter_bytes, int32_t device, void* stream);

  const void* counters() const { return counters_; }
  // Kernels find partial results relative to the counters, wherever those lie.
  template <class Params>
  void bind(Params& params) const {
    if (counters_ == nullptr) return;
    params.workspace = counters_;
    params.partials_offset = partials_offset_;
  }

 private:
  void* counters_ = nullptr;
  int64_t partials_offset_ = 0;
  std::optional<torch::stable::Tensor> partials_;
};

}  // namespace fused_resnet
