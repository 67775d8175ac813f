// How the warps of a Hopper block hand work to each other: the ring of stages, and the two warps that fill
// it.
//
// Every role of a block walks the same tiles in the same order, and the same steps of each tile; who waits
// for whom is left to mbarriers alone.
#pragma once

#include "../conv_params.h"
#include "epilogue.cuh"
#include "primitives_hopper.cuh"
#include "tiles.h"

namespace fused_resnet {

// The tiles of one block: blockIdx.x, blockIdx.x + gridDim.x, ... Neighbours in the order share their pixels.
template <class Tile>
struct TileWalk {
  uint32_t tile, tiles, turn;  // `turn` counts the tiles that this block has done

  __device__ __forceinline__ explicit TileWalk(const ConvParams& params)
      : tile(blockIdx.x), tiles((params.pixels + Tile::kM - 1) / Tile::kM * params.tiles_n), turn(0) {}
  __device__ __forceinline__ bool more() const { return tile < tiles; }
  __device__ __forceinline__ void advance() {
    tile += gridDim.x;
    ++turn;
  }
  __device__ __forceinline__ int pixel0(const ConvParams& params) const {
    return static_cast<int>(tile / params.tiles_n) * Tile::kM;
  }
  __device__ __forceinline__ int channel0(const ConvParams& params) const {
    return static_cast<int>(tile % params.tiles_n) * Tile::kN;
  }
};

// Where a role stands in the ring: its stage, and the parity of the phase that it waits for there.
template <class Tile>
struct Ring {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Tile::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Addresses of a block's shared memory, and its mbarriers: of each stage "full" (its copies have landed) and
// "empty" (all warps have multiplied it); of each of the two buffers of scales and shifts the same.
template <class Tile>
struct Shared {
  uint32_t base;

  __device__ __forceinline__ uint32_t stage(uint32_t i) const { return base + i * Tile::kStageBytes; }
  __device__ __forceinline__ uint32_t full(uint32_t i) const { return base + Tile::kBarrierOffset + i * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t i) const { return full(Tile::kStages + i); }
  __device__ __forceinline__ uint32_t norm(uint32_t turn) const {
    return base + Tile::kNormOffset + turn % 2 * Tile::kNormBytes;
  }
  __device__ __forceinline__ uint32_t norm_full(uint32_t turn) const {
    return full(2 * Tile::kStages + turn % 2);
  }
  __device__ __forceinline__ uint32_t norm_empty(uint32_t turn) const {
    return full(2 * Tile::kStages + 2 + turn % 2);
  }
  // Of the phase in which the buffer is filled for this turn.
  __device__ __forceinline__ static uint32_t norm_parity(uint32_t turn) { return turn / 2 % 2; }

  // By one thread, before the block's first barrier.
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(full(i), 1);
      mbarrier_init(empty(i), Tile::kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(norm_full(i), 32);
      mbarrier_init(norm_empty(i), Tile::kConsumerWarps);
    }
    mbarrier_init_fence();
  }
};

// One thread: the copies of every step. A step is one tap (r, s) and 64 channels of it; behind the last
// channel and outside of the image the tensor map gives zeros, so no other tail exists.
template <class Tile>
__device__ __forceinline__ void load_steps(const ConvParams& params, const Shared<Tile>& shared,
                                           const TensorMap& x, const TensorMap& weight,
                                           const TensorMap& proj_x, const TensorMap& proj_weight) {
  const int area = params.p * params.q;
  Ring<Tile> ring;
#pragma unroll 1
  for (TileWalk<Tile> walk(params); walk.more(); walk.advance()) {
    const int pixel0 = walk.pixel0(params), channel0 = walk.channel0(params);
    const int n = pixel0 / area, row = (pixel0 - n * area) / params.q;
    const int column = pixel0 - n * area - row * params.q;
#pragma unroll 1
    for (int i = 0; i < params.sources; ++i) {
      const ConvSource& source = params.source[i];
      const TensorMap& pixels = i == 0 ? x : proj_x;
      const TensorMap& filters = i == 0 ? weight : proj_weight;
      const int h = row * source.stride_h - source.padding_h, w = column * source.stride_w - source.padding_w;
      int r = 0, s = 0, c = 0, tap = 0;
#pragma unroll 1
      for (int step = 0; step < source.steps; ++step) {
        const uint32_t stage = shared.stage(ring.stage), full = shared.full(ring.stage);
        mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
        mbarrier_arrive_expecting(full, Tile::kStageBytes);
        copy_pixels(stage, pixels, full, c, w, h, n, s * source.dilation_w, r * source.dilation_h);
        copy_filters(stage + Tile::kBytesA, filters, full, c, tap, channel0);
        ring.advance();
        c += 64;
        if (c >= source.c) {
          c = 0;
          ++tap;
          if (++s == source.s) {
            s = 0;
            ++r;
          }
        }
      }
    }
  }
}

// One warp: scale and shift of every tile, up to two tiles ahead of the store.
template <class Tile>
__device__ __forceinline__ void load_norms(const ConvParams& params, const Shared<Tile>& shared) {
#pragma unroll 1
  for (TileWalk<Tile> walk(params); walk.more(); walk.advance()) {
    mbarrier_wait(shared.norm_empty(walk.turn), shared.norm_parity(walk.turn) ^ 1);
    load_norm<Tile, 32>(params, walk.channel0(params), shared.norm(walk.turn), threadIdx.x % 32);
    mbarrier_arrive(shared.norm_full(walk.turn));
  }
}

}  // namespace fused_resnet
