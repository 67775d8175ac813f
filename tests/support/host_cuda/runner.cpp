// The C interface of the host runtime, for ctypes: register tensors, launch one kernel, read the counters.
#include <cstdio>
#include <string>

#include "host_cuda/runtime.h"

namespace {
std::string text;

void append(const char* format, const char* name, unsigned long long a, unsigned long long b,
            unsigned long long c) {
  char line[256];
  snprintf(line, sizeof line, format, name, a, b, c);
  text += line;
}
}  // namespace

extern "C" {

void host_cuda_clear() {
  host_cuda::clear_tensors();
}

void host_cuda_tensor(const char* name, const void* begin, size_t bytes, int writable) {
  host_cuda::register_tensor(name, begin, bytes, writable != 0);
}

// `entry` is the host_entry of a kernel's shared object. Returns "" or what went wrong.
const char* host_cuda_launch(void (*entry)(const void*), const void* parameters, const unsigned* grid,
                             const unsigned* block, size_t dynamic_shared, int order,
                             unsigned long long seed) {
  text = host_cuda::launch(entry, parameters, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                           dynamic_shared, {static_cast<host_cuda::Order>(order), seed});
  return text.c_str();
}

// One counter a line: "load x 0 requests sectors bytes", "shared 0 wavefronts conflicts", "mma n".
const char* host_cuda_statistics() {
  text.clear();
  const auto& statistics = host_cuda::statistics();
  for (int phase = 0; phase < host_cuda::kPhases; phase++) {
    const std::string at = " " + std::to_string(phase);
    for (const auto& tensor : statistics.tensors) {
      const auto& load = tensor.load[phase];
      const auto& store = tensor.store[phase];
      append("load %s %llu %llu %llu\n", (tensor.name + at).c_str(), load.requests, load.sectors, load.bytes);
      append("store %s %llu %llu %llu\n", (tensor.name + at).c_str(), store.requests, store.sectors,
             store.bytes);
    }
    const auto& shared = statistics.shared[phase];
    append("shared%s %llu %llu %llu\n", at.c_str(), shared.wavefronts, shared.conflicts, 0);
  }
  append("mma%s %llu %llu %llu\n", "", statistics.mma, statistics.collectives, statistics.barriers);
  return text.c_str();
}
}
