// Split-K: several blocks share the steps of one tile; the last of them to arrive adds the partial sums and
// stores.
//
// Partial sums are added in the order of the splits, whichever block does it, so the result is the same bit
// for bit in every run: nothing has to change under torch.use_deterministic_algorithms.
#pragma once

#include "../conv_params.h"
#include "arrival.cuh"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

template <class Warp>
__device__ __forceinline__ void clear(float (&acc)[Warp::kFragments][4]) {
#pragma unroll
  for (int f = 0; f < Warp::kFragments; ++f) acc[f][0] = acc[f][1] = acc[f][2] = acc[f][3] = 0.0f;
}

// True for the block that goes on to store the tile; its acc then holds the whole sum.
template <class Tile, class Warp>
__device__ __forceinline__ bool reduce_splits(const ConvParams& params, float (&acc)[Warp::kFragments][4],
                                              uint32_t tile, uint32_t split, uint32_t flag) {
  // A partial tile is laid out as the threads hold it: fragment by fragment, 16 bytes a thread.
  constexpr int64_t kPartialBytes = int64_t{16} * Warp::kFragments * Tile::kThreads;
  char* const first = static_cast<char*>(params.workspace) + params.partials_offset +
                      static_cast<int64_t>(tile) * params.splits * kPartialBytes + threadIdx.x * 16;
  char* const mine = first + split * kPartialBytes;
#pragma unroll
  for (int f = 0; f < Warp::kFragments; ++f) {
    global_store_16(mine + f * Tile::kThreads * 16,
                    {bits_of(acc[f][0]), bits_of(acc[f][1]), bits_of(acc[f][2]), bits_of(acc[f][3])});
  }
  uint32_t* const counter = static_cast<uint32_t*>(params.workspace) + tile;
  if (!last_to_arrive(counter, static_cast<uint32_t>(params.splits), flag)) return false;

  clear<Warp>(acc);
  const char* partial = first;
#pragma unroll 1
  for (int s = params.splits; s > 0; --s, partial += kPartialBytes) {
#pragma unroll
    for (int f = 0; f < Warp::kFragments; ++f) {
      const Words4 v = workspace_load_16(partial + f * Tile::kThreads * 16);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[f][e] = add_rn(acc[f][e], float_of(v.w[e]));
    }
  }
  return true;
}

}  // namespace fused_resnet
