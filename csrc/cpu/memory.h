// Caches and scratch memory.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

// The size of a core's second-level cache in bytes (1 MiB where the system does not say).
int64_t level2_cache_bytes();

// What is read over and over lies in huge pages where it can: with pages of 4 KB a good part of the time goes
// into address translation, and neighbouring pages meet in the same sets of a cache (the third stage of a
// ResNet-18 took 0.72 ms instead of 0.52).
constexpr int64_t kHugePage = int64_t{2} << 20;

// The size of memory for `bytes`, and its alignment: whole huge pages unless it is small.
struct Extent {
  int64_t bytes, alignment;
  explicit Extent(int64_t bytes);
};

// Memory of that extent with the advice to use huge pages, contents undefined, to be freed with std::free.
// Throws std::bad_alloc.
void* allocate(int64_t bytes);

// Memory of the calling thread that lives until the thread ends: mapping megabytes anew for each call would
// cost more page faults than some of the convolutions take. Contents undefined.
float* thread_scratch(int64_t floats);

// Asks for huge pages for memory that has not been touched yet.
void advise_huge_pages(void* begin, int64_t bytes);

}  // namespace fused_resnet::cpu
