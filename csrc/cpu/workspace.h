// Memory for the outputs inside a chain.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace fused_resnet::cpu {

// Buffers of the calling thread that are handed out again and again, within a call and in the next ones. An
// output that is allocated and freed for each convolution costs more than its memory: each large free sweeps
// the allocator's small chunks together, from beyond the caches, and very large memory goes back to the
// system to be faulted in anew.
class Workspace {
 public:
  // Of the calling thread.
  static Workspace& mine();

  // An uninitialised float32 [n, k, p, q] in channels_last, to be used by the calling thread and until it is
  // given back: it does not own its memory.
  Tensor take(int64_t n, int64_t k, int64_t p, int64_t q);
  void give_back(const Tensor& taken);
  // All of them. What is too much to keep is freed.
  void give_back_all();

 private:
  struct Buffer {
    std::unique_ptr<float, void (*)(void*)> memory;
    int64_t bytes;
    bool taken;
  };
  std::vector<Buffer> buffers_;
};

}  // namespace fused_resnet::cpu
