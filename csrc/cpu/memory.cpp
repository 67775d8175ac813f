#include "memory.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__unix__)
  #include <unistd.h>
#endif
#if defined(__linux__)
  #include <sys/mman.h>
#endif

namespace fused_resnet::cpu {

int64_t level2_cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (reported > 0) return static_cast<int64_t>(reported);
#endif
    return static_cast<int64_t>(1 << 20);
  }();
  return bytes;
}

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
  // Advice only: a kernel without huge pages says no, and nothing is lost.
  if (bytes >= (int64_t{1} << 20)) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Extent::Extent(int64_t asked) {
  alignment = asked >= kHugePage / 4 ? kHugePage : 64;
  bytes = (asked + alignment - 1) / alignment * alignment;
}

void* allocate(int64_t bytes) {
  const Extent extent(bytes);
  void* memory = std::aligned_alloc(static_cast<size_t>(extent.alignment), static_cast<size_t>(extent.bytes));
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory, extent.bytes);
  return memory;
}

float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(allocate(floats * int64_t(sizeof(float)))));
    size = floats;
  }
  return memory.get();
}

}  // namespace fused_resnet::cpu
