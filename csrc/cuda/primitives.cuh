// The only file with inline PTX (but for primitives_hopper.cuh), and the whole of what a kernel here may ask
// of the GPU.
//
// A kernel may use these functions and, from CUDA itself, exactly this:
//   threadIdx.x, blockIdx.x, blockIdx.y, __syncthreads()         (one-dimensional blocks)
//   __device__, __global__, __forceinline__, __launch_bounds__, __grid_constant__, #pragma unroll
// No static or extern __shared__ variable, no warp vote, no CUDA vector or half type, no
// intrinsic, no printf. tests/support/host_cuda/ supplies another file of the same name with the same
// functions, so that g++ compiles the kernels unchanged; add a function here only together with its twin
// there.
//
// Shared memory is addressed by 32-bit byte addresses (`shared_base()` + offset); every access to it is one
// of the functions below. Global memory is addressed by ordinary pointers, and every access to it is one of
// the functions below. Numbers of 16 bits travel as raw bits (uint16_t, or two in a uint32_t with the lower
// address in the lower half).
#pragma once

#include <cstdint>

namespace fused_resnet {

// Whether the GPU compiled for copies from global to shared memory without passing registers, and multiplies
// bfloat16 and tf32 on its tensor cores: from sm_80 on. What is left for Turing (sm_75) says so by this.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAmpere = false;
#else
constexpr bool kAmpere = true;
#endif

// ---- vectors of 32-bit words, for 8- and 16-byte accesses ----
struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

__device__ __forceinline__ uint32_t bits_of(float v) {
  return __float_as_uint(v);
}
__device__ __forceinline__ float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}

// Makes the compiler keep this pointer in registers, where it would rather compute it again in every step.
__device__ __forceinline__ void keep(const char*& p) {
  asm volatile("" : "+l"(p));
}

// Marks the end of the main loop for tests/support/host_cuda, which counts each part's traffic apart.
__device__ __forceinline__ void enter_epilogue() {}

// ---- shared memory ----
// First byte of the block's dynamic shared memory; a multiple of 128.
__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

__device__ __forceinline__ float shared_load_f32(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t shared_load_u32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ Words4 shared_load_16(uint32_t address) {
  Words4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void shared_store_u16(uint32_t address, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
__device__ __forceinline__ void shared_store_u32(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void shared_store_f32(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
__device__ __forceinline__ void shared_store_f32x2(uint32_t address, float v0, float v1) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v0), "f"(v1) : "memory");
}
__device__ __forceinline__ void shared_store_8(uint32_t address, const Words2& v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.w[0]), "r"(v.w[1]) : "memory");
}
__device__ __forceinline__ void shared_store_16(uint32_t address, const Words4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.w[0]), "r"(v.w[1]),
               "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// ---- between the lanes of a warp ----
// The value of lane (lane ^ kMask); all 32 lanes take part.
template <int kMask>
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t v) {
  static_assert(0 < kMask && kMask < 32, "another lane of the warp");
  return __shfl_xor_sync(0xffffffffu, v, kMask);
}

// ---- asynchronous copies, global to shared; from sm_80 on ----
// Copies kBytes (16, 8 or 4; both addresses multiples of it), or writes zeros where `valid` is false: then
// `source` is not read and may point anywhere. The data may be read after commit, wait and (by other threads)
// a barrier.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t destination, const void* source, bool valid) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4, "cp.async copies 16, 8 or 4 bytes");
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // .cg: through L2 only; the tile is read once per block
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores ----
// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones); lanes 8i..8i+7 give the addresses of the
// 16-byte rows of matrix i. Lane l receives in r[i] the 32 bits at row l / 4, bytes 4 * (l % 4) of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// d += a * b; a is 16 x 16 (row major), b is 16 x 8 (column major), d is 16 x 8 in fp32. With g = lane / 4, t
// = lane % 4: d[0], d[1] are row g, columns 2t, 2t + 1; d[2], d[3] are row g + 8. Turing takes half the depth
// at a time, whose operands are half the registers.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kAmpere) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    const uint32_t b[2] = {b0, b1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
          "{%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  }
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with 16 x 8 times 8 x 8 tf32 operands (fp32 bits, already rounded by round_to_tf32).
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// fp32 bits to the nearest tf32, ties away from zero; without it the tensor core truncates.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(v)));
  return r;
}

// ---- arithmetic with IEEE rounding, whatever the compiler's fast-math flags ----
__device__ __forceinline__ float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ __forceinline__ float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
__device__ __forceinline__ float sqrt_rn(float a) {
  return __fsqrt_rn(a);
}

// ---- 16-bit floating point ----
__device__ __forceinline__ float f16_to_f32(uint16_t v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
__device__ __forceinline__ float bf16_to_f32(uint16_t v) {
  return __uint_as_float(static_cast<uint32_t>(v) << 16);
}
// Two numbers rounded to nearest even and packed, `low` in the lower half (the lower address).
__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
  if constexpr (kAmpere) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  } else {
    uint16_t half[2];
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half[0]) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half[1]) : "f"(high));
    return half[0] | static_cast<uint32_t>(half[1]) << 16;
  }
}
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  if constexpr (kAmpere) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  } else {
    const auto rounded = [](float v) {
      const uint32_t bits = bits_of(v);
      return v != v ? uint32_t{0x7fff} : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
  }
}

// ---- global memory ----
// Read-only for the whole launch (.nc).
__device__ __forceinline__ uint16_t global_load_u16(const void* p) {
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t global_load_u32(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ Words4 global_load_16(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
}
__device__ __forceinline__ Words2 global_load_8(const void* p) {
  Words2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p));
  return v;
}
__device__ __forceinline__ void global_store_u16(void* p, uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}
__device__ __forceinline__ void global_store_u32(void* p, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void global_store_8(void* p, const Words2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]) : "memory");
}
__device__ __forceinline__ void global_store_16(void* p, const Words4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3])
               : "memory");
}

// ---- between blocks of one launch ----
// Written by other blocks of this launch, so read from L2 (.cg), never from a stale L1 line.
__device__ __forceinline__ Words4 workspace_load_16(const void* p) {
  Words4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}
// Called by ONE thread, after a __syncthreads() that follows the block's global stores. Counts the arrival of
// this block and returns how many came before; the count goes back to 0 with arrival number `blocks`, ready
// for the next launch. All stores of the blocks that arrived before are visible to this block after its next
// __syncthreads().
__device__ __forceinline__ uint32_t arrive(uint32_t* counter, uint32_t blocks) {
  uint32_t before;
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("atom.global.relaxed.gpu.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(blocks - 1)
               : "memory");
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  return before;
}

}  // namespace fused_resnet
