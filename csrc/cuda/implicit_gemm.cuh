// One block's tile of y = act(BN(conv(x, w)) + residual), or, with a projection instead of the residual, of
// y = act(BN(conv(x, w)) + BN(conv1x1(proj_x, proj_w))).
//
// The convolution as a matrix product that never builds its matrix: rows are output pixels, columns output
// channels, the depth is R*S*C. Phases:
//   1 accumulate   copies of the next steps fly (cp.async) while the warps multiply the present one
//   2 projection   the same again for the second source, its 1x1 convolution (projection.cuh)
//   3 reduce       split-K: the last block of a tile to arrive adds the partial sums (split_k.cuh)
//   4 store        scale, shift, residual, activation; one rounding (epilogue.cuh)
// With Epilogue::kStatistics phases 2 and 3 are left out, and phase 4 stores the convolution as it is and
// takes the statistics of what was stored (statistics.cuh).
#pragma once

#include <type_traits>

#include "../conv_params.h"
#include "addressing.cuh"
#include "epilogue.cuh"
#include "load_gather.cuh"
#include "load_vector.cuh"
#include "primitives.cuh"
#include "projection.cuh"
#include "split_k.cuh"
#include "statistics.cuh"
#include "tiles.h"
#include "warp_fma.cuh"
#include "warp_mma.cuh"

namespace fused_resnet {

// Adds `steps` steps of the product, from where the loader stands, to acc. `overlap` runs while the first
// copies fly. Afterwards no copy is under way, and every thread may overwrite the pipeline's shared memory.
template <class Tile, class Warp, class Loader, class Overlap>
__device__ __forceinline__ void accumulate_by_copies(float (&acc)[Warp::kFragments][4], const Warp& warp,
                                                     Loader& loader, int steps, uint32_t pipeline,
                                                     Overlap overlap) {
  constexpr int kAhead = Tile::kStages - 1;
  const uint32_t pipeline_end = pipeline + Tile::kStagesBytes;
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) {
    if (i < steps) loader.issue(pipeline + i * Tile::kStageBytes);
    cp_async_commit();
  }
  overlap();

  uint32_t stage = pipeline, free_stage = pipeline + kAhead * Tile::kStageBytes;
#pragma unroll 1
  for (int remaining = steps; remaining > 0; --remaining) {
    // One group per step, whether or not it holds a copy: at most the latest kAhead - 1 still fly, so this
    // step's has landed.
    cp_async_wait<kAhead - 1>();
    // Every thread sees this step's data; and all have read the previous step's, so its stage is free.
    __syncthreads();
    typename Warp::Operands operands[2];
    warp.load(operands[0], stage, 0);
    if (remaining > kAhead) loader.issue(free_stage);
    cp_async_commit();
#pragma unroll
    for (int slab = 0; slab < Warp::kSlabs; ++slab) {
      if (slab + 1 < Warp::kSlabs) warp.load(operands[(slab + 1) % 2], stage, slab + 1);
      warp.multiply(acc, operands[slab % 2]);
    }
    free_stage = stage;
    stage += Tile::kStageBytes;
    if (stage == pipeline_end) stage = pipeline;
  }
  cp_async_wait<0>();
  __syncthreads();
}

// The same where copies pass registers: those of the next step are under way while the warps multiply.
template <class Tile, class Warp, class Loader, class Overlap>
__device__ __forceinline__ void accumulate_by_registers(float (&acc)[Warp::kFragments][4], const Warp& warp,
                                                        Loader& loader, int steps, uint32_t stage,
                                                        Overlap overlap) {
  typename Loader::Step next;
  if (steps > 0) loader.fetch(next);
  overlap();
#pragma unroll 1
  for (int remaining = steps; remaining > 0; --remaining) {
    __syncthreads();  // all have read the previous step
    loader.put(next, stage);
    __syncthreads();
    if (remaining > 1) loader.fetch(next);
    typename Warp::Operands operands;
#pragma unroll
    for (int slab = 0; slab < Warp::kSlabs; ++slab) {
      warp.load(operands, stage, slab);
      warp.multiply(acc, operands);
    }
  }
  __syncthreads();
}

template <class Tile, class Warp, class Loader, class Overlap>
__device__ __forceinline__ void accumulate(float (&acc)[Warp::kFragments][4], const Warp& warp,
                                           Loader& loader, int steps, uint32_t pipeline, Overlap overlap) {
  if constexpr (kAmpere) {
    accumulate_by_copies<Tile>(acc, warp, loader, steps, pipeline, overlap);
  } else {
    accumulate_by_registers<Tile>(acc, warp, loader, steps, pipeline, overlap);
  }
}

template <class Tile, class Warp, class Loader, Load kLoad>
__device__ __forceinline__ void conv_tile(const ConvParams& params) {
  const uint32_t shared = shared_base(), norm = shared + Tile::kNormOffset;
  const uint32_t tile = blockIdx.x, split = blockIdx.y;
  const uint32_t tile_m = tile / params.tiles_n, tile_n = tile - tile_m * params.tiles_n;
  const int pixel0 = static_cast<int>(tile_m) * Tile::kM, channel0 = static_cast<int>(tile_n) * Tile::kN;

  // The steps of all sources stand in one line; this block takes its share of it.
  int64_t all_steps = 0;
  for (int i = 0; i < params.sources; ++i) all_steps += params.source[i].steps;
  int first = static_cast<int>(all_steps * split / params.splits);
  int count = static_cast<int>(all_steps * (split + 1) / params.splits) - first;

  const Warp warp;
  float acc[Warp::kFragments][4];
  clear<Warp>(acc);
#pragma unroll 1
  for (int i = 0; i < params.sources; ++i) {
    const ConvSource& source = params.source[i];
    const int available = source.steps - first;
    const int steps = available < 0 ? 0 : count < available ? count : available;
    Loader loader(params, source, pixel0, channel0, first, shared + Tile::kRowsOffset);
    accumulate<Tile, Warp>(acc, warp, loader, steps, shared, [&] {
      if (i == 0) load_norm<Tile>(params, channel0, norm);
    });
    count -= steps;
    first = available < 0 ? -available : 0;
    if (params.sources == 2) {
      const uint32_t park = shared + Tile::template kSharedBytes<kLoad>;
      if (i == 0) {
        park_main<Tile, Warp>(acc, warp, norm, park);
      } else {
        add_main<Tile, Warp>(acc, warp, norm, park);
      }
    }
  }

  if (params.splits > 1 && !reduce_splits<Tile, Warp>(params, acc, tile, split, shared + Tile::kFlagOffset))
    return;
  store_tile<Tile, Warp>(params, acc, warp, pixel0, channel0, shared, norm);
}

template <class Tile, class Warp, class Loader>
__device__ __forceinline__ void conv_stats_tile(const ConvParams& params) {
  const uint32_t shared = shared_base(), norm = shared + Tile::kNormOffset;
  const uint32_t tile_m = blockIdx.x / params.tiles_n, tile_n = blockIdx.x - tile_m * params.tiles_n;
  const int pixel0 = static_cast<int>(tile_m) * Tile::kM, channel0 = static_cast<int>(tile_n) * Tile::kN;
  const Warp warp;
  float acc[Warp::kFragments][4];
  clear<Warp>(acc);
  const ConvSource& source = params.source[0];
  Loader loader(params, source, pixel0, channel0, 0, shared + Tile::kRowsOffset);
  accumulate<Tile, Warp>(acc, warp, loader, source.steps, shared, [&] {
    load_norm<Tile>(params, channel0, norm);  // the convolution's bias
  });
  store_with_statistics<Tile, Warp, 16 / Warp::kElementBytes>(params, acc, warp, tile_m, tile_n);
}

// The body of every kernel: picks the warp's arithmetic, the loader and the epilogue.
template <class Tile, Math kMath, Load kLoad, Epilogue kEpilogue>
__device__ __forceinline__ void conv_kernel(const ConvParams& params) {
  using Warp = std::conditional_t<kMath == Math::kFloat32, WarpFma<Tile>, WarpMma<Tile, kMath>>;
  constexpr int kBytes = Warp::kElementBytes;
  using Loader =
      std::conditional_t<kLoad == Load::kVector, VectorLoad<Tile, kBytes>, GatherLoad<Tile, kBytes>>;
  if constexpr (kEpilogue == Epilogue::kTail) conv_tile<Tile, Warp, Loader, kLoad>(params);
  if constexpr (kEpilogue == Epilogue::kStatistics) conv_stats_tile<Tile, Warp, Loader>(params);
}

// Blocks that must find room on an SM. On Turing the next step takes registers as well; three blocks of a
// tile on the FMA units would spill.
template <class Tile, Math kMath>
constexpr int least_blocks() {
  return !kAmpere && kMath == Math::kFloat32 && Tile::kBlocks == 3 ? 2 : Tile::kBlocks;
}

// On Turing the tile has one stage; what Turing has no arithmetic or no registers for is empty there, and the
// planner does not choose it.
template <class Tile, Math kMath, Load kLoad, Epilogue kEpilogue>
__device__ __forceinline__ void conv_entry(const ConvParams& params) {
  if constexpr (kAmpere) {
    conv_kernel<Tile, kMath, kLoad, kEpilogue>(params);
  } else if constexpr (kRunsOnTuring<Tile, kMath>) {
    conv_kernel<OneStage<Tile>, kMath, kLoad, kEpilogue>(params);
  }
}

}  // namespace fused_resnet
