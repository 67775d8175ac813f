// A CUDA thread block on one host thread: enough of the CUDA model to run the kernels of csrc/cuda unchanged
// and to be stricter than a GPU while doing so.
//
//   * every CUDA thread is a fiber; a warp advances lane by lane between warp-level operations;
//   * warp collectives (ldmatrix, mma, shuffles) need all lanes; a memory access is one request of the lanes
//     that reach it, as on hardware, so that sectors and bank conflicts can be counted;
//   * cp.async poisons its destination at once and delivers the data only in the wait that guarantees it;
//   * shared memory starts as NaN, blocks and warps run in a seeded random order.
//
// Nothing here is thread safe: one launch at a time per process.
#pragma once

#ifndef FUSED_RESNET_HOST_TURING
  #define FUSED_RESNET_HOST_TURING 0
#endif

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host_cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum class Order : int { kAscending = 0, kDescending = 1, kRandom = 2 };

struct Options {
  Order order = Order::kRandom;
  uint64_t seed = 1;
};

// Counters are kept per phase of the kernel, which the kernel announces itself.
constexpr int kPhases = 2;  // 0: main loop, 1: epilogue

struct Traffic {
  uint64_t requests = 0;  // one per warp and instruction
  uint64_t sectors = 0;   // 32-byte pieces touched, summed over requests
  uint64_t bytes = 0;     // bytes asked for (one address asked for twice in a request counts once)
};

struct Tensor {
  std::string name;
  uintptr_t begin, end;
  bool writable;
  Traffic load[kPhases], store[kPhases];
};

struct SharedTraffic {
  uint64_t wavefronts = 0;  // what the accesses need without any conflict
  uint64_t conflicts = 0;   // wavefronts on top of that
};

struct Statistics {
  std::vector<Tensor> tensors;
  SharedTraffic shared[kPhases];
  uint64_t mma = 0, collectives = 0, barriers = 0, blocks = 0;
};

// One operation of a warp. `execute` sees the operands of the lanes in `mask` (pointers to the lanes' own
// frames); a collective needs every lane of the warp, any other operation takes the lanes that are there.
struct Warp;
struct WarpOp {
  const char* name;
  bool collective;
  void (*execute)(Warp& warp, uint32_t mask);
};

// ---- called by kernels, through primitives.cuh
void perform(const WarpOp& op, void* operands);  // returns when the operation has been executed
void barrier(const char* file, int line);
void set_phase(int phase);
[[noreturn]] void fail(
    const std::string& what);  // ends the launch with this message and the thread's position

// cp.async of the running thread
void copy_async(uint32_t shared_offset, const void* source, uint32_t bytes, uint32_t source_bytes);
void commit_copies();
void wait_copies(uint32_t newest_groups_left);

unsigned char* shared_base();
uint32_t shared_offset(const void* pointer,
                       uint32_t bytes);  // checked: inside the block's dynamic shared memory
void* warp_operands(Warp& warp, int lane);
void check_global(const void* pointer, uint32_t bytes, bool write);  // bounds, alignment, write permission

struct Access {  // one lane's part of a request
  uintptr_t address;
  uint32_t bytes;
};
void count_global(const Access* lanes, uint32_t mask, bool store);
void count_shared(const Access* lanes, uint32_t mask, uint32_t bytes_per_lane);
Statistics& statistics();

// ---- called by the harness
void clear_tensors();
void register_tensor(const char* name, const void* begin, size_t bytes, bool writable);
// Runs `kernel(context)` once per thread; returns "" or the sentence that says what went wrong where.
std::string launch(void (*kernel)(const void*), const void* context, Dim3 grid, Dim3 block,
                   size_t dynamic_shared, Options options);

}  // namespace host_cuda

// ---- the names that CUDA sources use
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host_cuda::barrier(file, line);
}
