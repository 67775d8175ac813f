// Caches and scratch memory.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

// The size of a core's second-level cache in bytes (1 MiB where the system does not say).
int64_t level2_cache_bytes();

// Memory of the calling thread that lives until the thread ends: mapping megabytes anew for each call would
// cost more page faults than some of the convolutions take. 64-byte aligned, contents undefined.
float* thread_scratch(int64_t floats);

// Asks for huge pages for memory that has not been touched yet. Weights are streamed once per call, and with
// pages of 4 KB a good part of the time goes into address translation: 13 against 18 GB/s for weights from
// beyond the caches (one thread, in a virtual machine).
void advise_huge_pages(void* begin, int64_t bytes);

}  // namespace fused_resnet::cpu
