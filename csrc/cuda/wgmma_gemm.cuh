// The tail on Hopper (sm_90a): y = act(BN(conv(x, w)) + residual), or with a projection instead of the
// residual y = act(BN(conv(x, w)) + BN(conv1x1(proj_x, proj_w))). The same sum as implicit_gemm.cuh, in
// another way:
//
//   * Persistent: about one block per SM, which takes tile after tile.
//   * Warp-specialised. A block is three warpgroups of four warps. In the first, one thread issues copies
//     (load_steps) and one warp forms scales and shifts (load_norms); the other two multiply and store. They
//     give each other word through mbarriers (wgmma_pipeline.cuh), so the copies of the next tile fly while
//     this one is multiplied and stored.
//   * Copies by tensor map (TMA): the hardware knows the convolution. An im2col map walks the windows of
//     [N, H, W, C] with the convolution's stride and delivers, for one tap and 64 channels, the pixel of each
//     of the tile's windows; its place in the window is an offset of the copy. No address is computed here.
//   * Products by wgmma, straight from shared memory in the 128-byte swizzle that the maps write; sums in
//   fp32
//     registers, which the first warpgroup gives up for it (setmaxnreg).
//
// The projection is a second sum over its own steps: the first one, scaled, waits in registers meanwhile
// (projection.cuh says why the two cannot share one). Scale, shift, residual and activation as everywhere.
//
// What this takes is said in tensor_maps.cpp (tensor_maps_take); all else is left to implicit_gemm.cuh.
#pragma once

#include "../conv_params.h"
#include "primitives_hopper.cuh"
#include "tiles.h"
#include "wgmma_epilogue.cuh"
#include "wgmma_pipeline.cuh"

namespace fused_resnet {

template <class Tile>
using Sums = float[Tile::kRowBlocks][Tile::kN / 2];

template <class Tile>
__device__ __forceinline__ void clear_sums(Sums<Tile>& acc) {
#pragma unroll
  for (int b = 0; b < Tile::kRowBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < Tile::kN / 2; ++i) acc[b][i] = 0.0f;
  }
}

// Adds `steps` steps to the sums of warpgroup `group`, from where the ring stands. A step's stage is given
// back when the next one's products are under way, so the tensor cores never wait for a hand-over.
template <class Tile, bool kBFloat16Operands>
__device__ __forceinline__ void multiply_steps(Sums<Tile>& acc, Ring<Tile>& ring, const Shared<Tile>& shared,
                                               int steps, uint32_t group) {
  const bool speaks = threadIdx.x % 32 == 0;  // one arrival per warp
  uint32_t used = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const uint32_t stage = shared.stage(ring.stage);
    const uint64_t a = operand_at(stage + group * Tile::kRowBlocks * 64 * Tile::kDepthBytes);
    const uint64_t b = operand_at(stage + Tile::kBytesA);
    mbarrier_wait(shared.full(ring.stage), ring.parity);
    wgmma_fence();
#pragma unroll
    for (int slab = 0; slab < Tile::kDepthBytes / 32; ++slab) {
#pragma unroll
      for (int block = 0; block < Tile::kRowBlocks; ++block) {
        wgmma<kBFloat16Operands, Tile::kN>(acc[block], a + block * (64 * Tile::kDepthBytes / 16) + slab * 2,
                                           b + slab * 2);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 && speaks) mbarrier_arrive(used);
    used = shared.empty(ring.stage);
    ring.advance();
  }
  wgmma_wait<0>();
  if (steps > 0 && speaks) mbarrier_arrive(used);
}

// The warps that multiply: sums, then the store, tile after tile.
template <class Tile, bool kBFloat16Operands>
__device__ __forceinline__ void multiply_and_store(const ConvParams& params, const Shared<Tile>& shared) {
  const uint32_t warp = threadIdx.x / 32 - 4, group = warp / 4;
  const uint32_t staging = shared.base + Tile::kStagingOffset + warp * Tile::kStagingBytes;
  Ring<Tile> ring;
#pragma unroll 1
  for (TileWalk<Tile> walk(params); walk.more(); walk.advance()) {
    const uint32_t norm = shared.norm(walk.turn);
    Sums<Tile> acc;
    clear_sums<Tile>(acc);
    multiply_steps<Tile, kBFloat16Operands>(acc, ring, shared, params.source[0].steps, group);
    mbarrier_wait(shared.norm_full(walk.turn), shared.norm_parity(walk.turn));
    if constexpr (Tile::kProjection) {
      if (params.sources == 2) {
        float main[Tile::kN / 2];
        for_columns<Tile>(norm, [&](int i, float scale) { main[i] = mul_rn(acc[0][i], scale); });
        clear_sums<Tile>(acc);
        multiply_steps<Tile, kBFloat16Operands>(acc, ring, shared, params.source[1].steps, group);
        for_columns<Tile>(norm + 2 * Tile::kN * 4,
                          [&](int i, float scale) { acc[0][i] = add_rn(mul_rn(acc[0][i], scale), main[i]); });
      }
    }
    const int row = walk.pixel0(params) + group * Tile::kRowBlocks * 64 + warp % 4 * 16;
#pragma unroll
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      store_warp<Tile>(params, acc[block], row + block * 64, walk.channel0(params), staging, norm);
    }
    warp_sync();  // all lanes have read their scales and shifts
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.norm_empty(walk.turn));
  }
}

// The body of every kernel of the family. Elsewhere than on Hopper it is empty, and the planner does not
// choose it.
template <class Tile, Math kMath>
__device__ __forceinline__ void wgmma_entry(const ConvParams& params, const TensorMap& x,
                                            const TensorMap& weight, const TensorMap& proj_x,
                                            const TensorMap& proj_weight) {
  if constexpr (kHopper) {
    // 65536 registers: 128 threads with 40, 256 with 232.
    constexpr int kFewRegisters = 40, kManyRegisters = 232;
    const Shared<Tile> shared{swizzled_shared_base()};
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x == 0) shared.init();
    __syncthreads();
    if (warp < 4) {
      give_registers_back<kFewRegisters>();
      if (warp == 0 && elect_one()) {
        load_steps<Tile>(params, shared, x, weight, proj_x, proj_weight);
      } else if (warp == 1) {
        load_norms<Tile>(params, shared);
      }
    } else {
      ask_for_registers<kManyRegisters>();
      multiply_and_store<Tile, kMath == Math::kBFloat16>(params, shared);
    }
  }
}

}  // namespace fused_resnet
