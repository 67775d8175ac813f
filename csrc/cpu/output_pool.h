// Memory for the outputs of convolutions, used again once nobody holds the output any more.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace fused_resnet::cpu {

// An uninitialised [n, k, p, q] in channels_last, float32 or bfloat16. From torch 2.11 on, a large one lies
// in memory of a pool of the process, to which it returns with the last reference to its storage: the
// allocator would hand large memory back to the system and fault it in anew in the next call, a tenth to a
// fifth of a ResNet's time at batch 8. Older versions of torch cannot tell when a storage ends; there it is
// torch's own memory.
Tensor empty_output(int64_t n, int64_t k, int64_t p, int64_t q, bool bf16);

}  // namespace fused_resnet::cpu
