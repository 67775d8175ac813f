// The projection shortcut in the same launch: two accumulations, two scales, one store.
//
//   acc = scale0[k] * sum(x * w) + scale1[k] * sum(proj_x * proj_w)
//
// The two sums cannot share accumulators (dividing by a scale is neither exact nor possible at 0, and scaled
// fp16 weights would be rounded twice), and a second set of accumulators would cost every kernel, projection
// or not, up to 128 registers a thread. So the scaled main sum waits in shared memory, in fp32, while the
// registers accumulate the projection: each thread reads back what it wrote itself, 16 bytes a lane, without
// a barrier or a bank conflict.
#pragma once

#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

template <class Tile>
__device__ __forceinline__ uint32_t parked(uint32_t park, int fragment) {
  return park + (fragment * Tile::kThreads + threadIdx.x) * 16;
}

// After the main sum: parks scale0 * acc and clears acc.
template <class Tile, class Warp>
__device__ __forceinline__ void park_main(float (&acc)[Warp::kFragments][4], const Warp& warp, uint32_t norm,
                                          uint32_t park) {
  warp.scale_columns(acc, norm);
#pragma unroll
  for (int f = 0; f < Warp::kFragments; ++f) {
    shared_store_16(parked<Tile>(park, f),
                    {bits_of(acc[f][0]), bits_of(acc[f][1]), bits_of(acc[f][2]), bits_of(acc[f][3])});
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[f][e] = 0.0f;
  }
}

// After the projection's sum: acc = scale1 * acc + what was parked.
template <class Tile, class Warp>
__device__ __forceinline__ void add_main(float (&acc)[Warp::kFragments][4], const Warp& warp, uint32_t norm,
                                         uint32_t park) {
  warp.scale_columns(acc, norm + 2 * Tile::kN * 4);
#pragma unroll
  for (int f = 0; f < Warp::kFragments; ++f) {
    const Words4 main = shared_load_16(parked<Tile>(park, f));
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[f][e] = add_rn(acc[f][e], float_of(main.w[e]));
  }
}

}  // namespace fused_resnet
