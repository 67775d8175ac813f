// Caches and scratch memory.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

// The size of a core's second-level cache in bytes (1 MiB where the system does not say).
int64_t level2_cache_bytes();

// Memory of the calling thread that lives until the thread ends: mapping megabytes anew for each call would
// cost more page faults than some of the convolutions take. 64-byte aligned, contents undefined.
float* thread_scratch(int64_t floats);

}  // namespace fused_resnet::cpu
