// What a kernel may ask of a Hopper GPU (sm_90a) beyond primitives.cuh: mbarriers, copies by tensor map
// (TMA), products of warpgroups (wgmma), and registers that move between warpgroups. With primitives.cuh the
// only file with inline PTX. There is no host twin of it: kernels on it are proven by the PTX that nvcc
// makes.
//
// Two proxies reach shared memory. Tensor maps write and wgmma reads it through the asynchronous one, loads
// and stores through the generic one; a kernel here keeps the two in separate places, so no proxy fence is
// needed but the one that follows the initialisation of the mbarriers.
#pragma once

#include <cstdint>

#include "primitives.cuh"
#include "tensor_map.h"

namespace fused_resnet {

// Whether the GPU compiled for has all of this.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// ---- the block ----
// First byte of the block's dynamic shared memory, on a whole pattern of the 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled_shared_base() {
  extern __shared__ __align__(1024) unsigned char swizzled_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(swizzled_memory));
}
// Orders the shared accesses of a warp's lanes.
__device__ __forceinline__ void warp_sync() {
  __syncwarp();
}
// True in one lane of the warp, the same one every time.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}
// Called by all warps of a warpgroup: the registers each of their threads keeps from here on. Those given up
// must be enough for those asked for.
template <int kCount>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void ask_for_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- mbarriers ----
// A barrier of 8 bytes in shared memory. A phase ends when `count` arrivals and all announced bytes are in;
// phases are told apart by their parity, that of the first is 0.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// By the thread that initialised, before the __syncthreads() after which others use the barriers.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity; at once where the latest to have ended is that one.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// ---- copies by tensor map, global to shared ----
// By one thread each. `map` is a kernel parameter (__grid_constant__); what lies outside of the tensor
// arrives as zeros and counts as bytes all the same.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A column of pixels, 64 channels each, from an im2col map of [N, H, W, C]: it begins where the filter's
// corner stands at (w, h) of image n, and takes from every window the pixel `right`, `down` of its corner.
__device__ __forceinline__ void copy_pixels(uint32_t destination, const TensorMap& map, uint32_t barrier,
                                            int c, int w, int h, int n, int right, int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(right)),
      "h"(static_cast<uint16_t>(down))
      : "memory");
}
// A box of filters from a tiled map of [K, R*S, C], 64 channels of one tap.
__device__ __forceinline__ void copy_filters(uint32_t destination, const TensorMap& map, uint32_t barrier,
                                             int c, int tap, int k) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c), "r"(tap), "r"(k)
      : "memory");
}

// ---- products of a warpgroup ----
// What tells wgmma where an operand lies: rows of 128 bytes (64 elements of the depth), 8 of them a pattern
// of the 128-byte swizzle, patterns one after the other. 16 elements further down the depth are 32 bytes on.
__device__ __forceinline__ uint64_t operand_at(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kPatternBytes = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kPatternBytes | uint64_t{1} << 16 | (address >> 4 & 0x3fff);
}
// Before the first product, and whenever other instructions have written the sums.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// d += a * b: a is 64 x 16 (row major), b is 16 x N (column major), d is 64 x N in fp32. Of warp v of the
// warpgroup, with g = lane / 4 and t = lane % 4: d[4j], d[4j + 1] are row 16v + g, columns 8j + 2t, 8j + 2t +
// 1; d[4j + 2], d[4j + 3] are row 16v + g + 8. Nothing may touch d until the group has been waited for.
template <bool kBFloat16Operands, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b);

#define FUSED_RESNET_WGMMA_64(type)                                                                     \
  asm volatile(                                                                                         \
      "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type    \
      "." type                                                                                          \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "           \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                 \
      "}, %32, %33, add, 1, 1, 0, 0;\n}"                                                                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),        \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),      \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),      \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                           \
      : "l"(a), "l"(b))
#define FUSED_RESNET_WGMMA_128(type)                                                                    \
  asm volatile(                                                                                         \
      "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type   \
      "." type                                                                                          \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "           \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "           \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "           \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                           \
      "}, %64, %65, add, 1, 1, 0, 0;\n}"                                                                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),        \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),      \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),      \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),      \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),      \
        "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),      \
        "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),      \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])       \
      : "l"(a), "l"(b))

template <bool kBFloat16Operands, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  static_assert(kN == 64 || kN == 128, "the widths in use");
  if constexpr (kN == 64) {
    if constexpr (kBFloat16Operands) {
      FUSED_RESNET_WGMMA_64("bf16");
    } else {
      FUSED_RESNET_WGMMA_64("f16");
    }
  } else {
    if constexpr (kBFloat16Operands) {
      FUSED_RESNET_WGMMA_128("bf16");
    } else {
      FUSED_RESNET_WGMMA_128("f16");
    }
  }
}
#undef FUSED_RESNET_WGMMA_64
#undef FUSED_RESNET_WGMMA_128

}  // namespace fused_resnet
