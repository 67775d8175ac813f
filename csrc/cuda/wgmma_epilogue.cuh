// y = act(scale * acc + shift + residual) of a warp of the Hopper family, in fp32, rounded once.
//
// wgmma leaves 16 rows to each warp, scattered over its lanes. The warp passes them through shared memory of
// its own, some columns at a time; then neighbouring lanes take 16 bytes each of one row of y and residual.
// No other warp takes part, so no barrier is needed.
#pragma once

#include "../conv_params.h"
#include "numbers.cuh"
#include "primitives_hopper.cuh"
#include "tiles.h"

namespace fused_resnet {

// Calls body(i, scale or shift of its column) for every sum acc[i] of a lane; `factors` is the shared address
// of the tile's kN floats.
template <class Tile, class Body>
__device__ __forceinline__ void for_columns(uint32_t factors, Body&& body) {
  const uint32_t lane_column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < Tile::kN / 8; ++j) {
    const uint32_t at = factors + (j * 8 + lane_column) * 4;
    const float f0 = shared_load_f32(at), f1 = shared_load_f32(at + 4);
    body(4 * j, f0);
    body(4 * j + 1, f1);
    body(4 * j + 2, f0);
    body(4 * j + 3, f1);
  }
}

// Stores the 16 rows of y from `row` on, with the tile's scales and shifts at `norm`.
template <class Tile>
__device__ __forceinline__ void store_warp(const ConvParams& params, const float (&acc)[Tile::kN / 2],
                                           int row, int channel0, uint32_t staging, uint32_t norm) {
  constexpr int kLanes = Tile::kStagingColumns / 8, kRowsAtOnce = 32 / kLanes, kTurns = 16 / kRowsAtOnce;
  const int lane = threadIdx.x % 32, packet = lane % kLanes * 8, first = lane / kLanes;
  const uint32_t put = staging + lane / 4 * Tile::kStagingPitch + lane % 4 * 8;
#pragma unroll
  for (int pass = 0; pass < Tile::kN / Tile::kStagingColumns; ++pass) {
    const int column = pass * Tile::kStagingColumns + packet, channel = channel0 + column;
    const bool exists = channel < params.k;
    Words4 residual[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int pixel = row + first + turn * kRowsAtOnce;
      residual[turn] = {};
      if (params.residual && exists && pixel < params.pixels) {
        residual[turn] = load_packet<8>(params.residual, static_cast<int64_t>(pixel) * params.k + channel,
                                        params.residual_dtype);
      }
    }
    warp_sync();  // the previous rows have been read
#pragma unroll
    for (int j = 0; j < Tile::kStagingColumns / 8; ++j) {
      const float* const d = acc + (pass * Tile::kStagingColumns / 8 + j) * 4;
      shared_store_f32x2(put + j * 32, d[0], d[1]);
      shared_store_f32x2(put + 8 * Tile::kStagingPitch + j * 32, d[2], d[3]);
    }
    warp_sync();
    float scale[8], shift[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t at = norm + (column + i) * 4;
      scale[i] = shared_load_f32(at);
      shift[i] = shared_load_f32(at + Tile::kN * 4);
      if (Tile::kProjection && params.sources == 2) {  // both sums are scaled already
        scale[i] = 1.0f;
        shift[i] = add_rn(shift[i], shared_load_f32(at + 3 * Tile::kN * 4));
      }
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int staged = first + turn * kRowsAtOnce, pixel = row + staged;
      const uint32_t from = staging + staged * Tile::kStagingPitch + packet * 4;
      const Words4 words[2] = {shared_load_16(from), shared_load_16(from + 16)};
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = fma_rn(float_of(words[i / 4].w[i % 4]), scale[i], shift[i]);
        if (params.residual) v[i] = add_rn(v[i], unpack<8>(residual[turn], i, params.residual_dtype));
        v[i] = activate(v[i], params.activation);
      }
      if (exists && pixel < params.pixels) {
        store_packet<8>(params.y, static_cast<int64_t>(pixel) * params.k + channel,
                        pack_packet<8>(v, params.y_dtype), params.y_dtype);
      }
    }
  }
}

}  // namespace fused_resnet
