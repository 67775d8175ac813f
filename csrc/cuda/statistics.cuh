// The epilogue of a training tail's convolution: y = acc + bias, and mean and variance of y as it was
// rounded.
//
// Each thread keeps count, mean and M2 of its channels while it stores its rows; the block merges its threads
// and publishes one partial result per channel. Blocks of one column of tiles are merged in two steps, groups
// of kGroupTiles tiles and then the groups, each by the last block to arrive: so no block ever merges very
// many, and the order is that of the tiles, whoever comes last (moments.cuh).
#pragma once

#include "../conv_params.h"
#include "arrival.cuh"
#include "epilogue.cuh"
#include "moments.cuh"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

// The counters of a column: its own, then those of its groups. Partial results: those of the groups, then
// those of the tiles; each is `sums` and `M2` of kN channels, the sum being count * mean.
template <class Tile>
struct Column {
  static constexpr int kPartBytes = 2 * Tile::kN * 4;

  uint32_t* counters;
  char* group_parts;
  char* tile_parts;
  int tiles, groups, pixels;

  __device__ __forceinline__ Column(const ConvParams& params, uint32_t tile_n) : pixels(params.pixels) {
    tiles = (params.pixels + Tile::kM - 1) / Tile::kM;
    groups = (tiles + kGroupTiles - 1) / kGroupTiles;
    counters = static_cast<uint32_t*>(params.workspace) + static_cast<int64_t>(tile_n) * (groups + 1);
    char* const partials = static_cast<char*>(params.workspace) + params.partials_offset;
    group_parts = partials + static_cast<int64_t>(tile_n) * (groups + tiles) * kPartBytes;
    tile_parts = group_parts + int64_t{groups} * kPartBytes;
  }
  // Pixels of the tiles [begin, end).
  __device__ __forceinline__ float count(int begin, int end) const {
    const int last = end == tiles ? pixels : end * Tile::kM;
    return static_cast<float>(last - begin * Tile::kM);
  }
  __device__ __forceinline__ int group_end(int group) const {
    const int end = (group + 1) * kGroupTiles;
    return end < tiles ? end : tiles;
  }
};

// Stores the staged rows of one pass, kCount channels a thread, and adds what was stored to the moments.
template <class Tile, class Warp, int kCount>
__device__ __forceinline__ void store_rows_with_moments(const ConvParams& params, int pixel0, int channel0,
                                                        int pass, uint32_t staging,
                                                        const float (&bias)[kCount],
                                                        Moments<kCount>& moments) {
  using S = Staging<Tile, Warp>;
  constexpr int kLanes = Tile::kN / kCount, kRowsAtOnce = Tile::kThreads / kLanes;
  constexpr int kTurns = S::kRows / kRowsAtOnce, kBatch = kTurns < 4 ? kTurns : 4;
  static_assert(S::kRows % kRowsAtOnce == 0 && kTurns % kBatch == 0, "whole turns");
  const int column = static_cast<int>(threadIdx.x) % kLanes * kCount,
            row = static_cast<int>(threadIdx.x) / kLanes;
  if (channel0 + column >= params.k) return;

#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn += kBatch) {
    Words4 packet[kBatch];  // as stored
    bool exists[kBatch];
    float rows = 0.0f;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int staged = row + (turn + b) * kRowsAtOnce;
      const int pixel = pixel0 + S::tile_row(staged, pass);
      const uint32_t from = staging + staged * S::kPitch + column * 4;
      float v[kCount];
      if constexpr (kCount == 1) {
        v[0] = add_rn(shared_load_f32(from), bias[0]);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
          const Words4 words = shared_load_16(from + i * 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) v[i + e] = add_rn(float_of(words.w[e]), bias[i + e]);
        }
      }
      const int dtype = kCount == 4 ? kFloat32 : params.y_dtype;  // the planner's promise
      packet[b] = pack_packet<kCount>(v, dtype);
      exists[b] = pixel < params.pixels;
      if (!exists[b]) continue;
      rows += 1.0f;
      store_packet<kCount>(params.y, static_cast<int64_t>(pixel) * params.k + channel0 + column, packet[b],
                           dtype);
    }
    if (rows == 0.0f) continue;
    // The batch by itself, its mean and M2 around it; then one merge.
    const float total = add_rn(moments.count, rows), share = div_rn(rows, total);
    const float cross = mul_rn(moments.count, share), inverse = div_rn(1.0f, rows);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int dtype = kCount == 4 ? kFloat32 : params.y_dtype;
      float sum = 0.0f, m2 = 0.0f;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (exists[b]) sum = add_rn(sum, unpack<kCount>(packet[b], i, dtype));
      }
      const float mean = mul_rn(sum, inverse);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float d = add_rn(unpack<kCount>(packet[b], i, dtype), -mean);
        if (exists[b]) m2 = fma_rn(d, d, m2);
      }
      merge_moments(moments.mean[i], moments.m2[i], mean, m2, share, cross);
    }
    moments.count = total;
  }
}

// Stores the tile; two planes at `plane` then hold what the block has to publish.
template <class Tile, class Warp, int kCount>
__device__ __forceinline__ void store_tile_with_moments(const ConvParams& params,
                                                        const float (&acc)[Warp::kFragments][4],
                                                        const Warp& warp, int pixel0, int channel0,
                                                        uint32_t staging, float pixels,
                                                        uint32_t plane_bytes) {
  constexpr int kLanes = Tile::kN / kCount;
  const uint32_t shift = staging + Tile::kNormOffset + Tile::kN * 4;  // behind the scales: here, the bias
  float bias[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bias[i] = shared_load_f32(shift + (static_cast<int>(threadIdx.x) % kLanes * kCount + i) * 4);
  }
  Moments<kCount> moments;
  moments.clear();
#pragma unroll 1
  for (int pass = 0; pass < Staging<Tile, Warp>::kPasses; ++pass) {
    if (pass > 0) __syncthreads();  // the previous pass has been read
    stage_pass<Tile, Warp>(acc, warp, pass, staging);
    __syncthreads();
    store_rows_with_moments<Tile, Warp, kCount>(params, pixel0, channel0, pass, staging, bias, moments);
  }
  __syncthreads();  // the last pass has been read: its memory now takes the moments
  merge_slots<Tile::kThreads>(moments, pixels, staging, plane_bytes, Slots(kLanes, Tile::kThreads));
}

template <class Tile, class Warp, int kVector>
__device__ __forceinline__ void store_with_statistics(const ConvParams& params,
                                                      const float (&acc)[Warp::kFragments][4],
                                                      const Warp& warp, uint32_t tile_m, uint32_t tile_n) {
  constexpr int kPitch = Tile::kN, kPlaneBytes = Tile::kThreads * kVector * 4;
  constexpr int kPartBytes = Column<Tile>::kPartBytes;
  static_assert(2 * kPlaneBytes <= Tile::kPipelineBytes, "the moments fit where the pipeline was");
  enter_epilogue();
  const uint32_t plane = shared_base(), flag = plane + Tile::kFlagOffset;
  const int tile = static_cast<int>(tile_m), group = tile / kGroupTiles;
  const int pixel0 = tile * Tile::kM, channel0 = static_cast<int>(tile_n) * Tile::kN;
  const Column<Tile> column(params, tile_n);
  const float pixels = column.count(tile, tile + 1);
  if (params.y_vector == kVector) {
    store_tile_with_moments<Tile, Warp, kVector>(params, acc, warp, pixel0, channel0, plane, pixels,
                                                 kPlaneBytes);
  } else {
    store_tile_with_moments<Tile, Warp, 1>(params, acc, warp, pixel0, channel0, plane, pixels, kPlaneBytes);
  }
  publish<2>(column.tile_parts + int64_t{tile} * kPartBytes, kPitch, Tile::kN, plane, kPlaneBytes);

  const int first = group * kGroupTiles, end = column.group_end(group);
  if (!last_to_arrive(column.counters + 1 + group, end - first, flag)) return;
  merge_parts<Tile::kThreads>(
      column.tile_parts, kPartBytes, kPitch, first, end, [&](int i) { return column.count(i, i + 1); },
      column.count(first, end), Tile::kN, plane, kPlaneBytes);
  publish<2>(column.group_parts + int64_t{group} * kPartBytes, kPitch, Tile::kN, plane, kPlaneBytes);
  if (!last_to_arrive(column.counters, column.groups, flag)) return;
  const float all = static_cast<float>(params.pixels);
  merge_parts<Tile::kThreads>(
      column.group_parts, kPartBytes, kPitch, 0, column.groups,
      [&](int i) { return column.count(i * kGroupTiles, column.group_end(i)); }, all, Tile::kN, plane,
      kPlaneBytes);
  for (int j = threadIdx.x; j < Tile::kN; j += Tile::kThreads) {
    const int k = channel0 + j;
    if (k >= params.k) break;
    global_store_u32(params.mean + k, bits_of(div_rn(shared_load_f32(plane + j * 4), all)));
    global_store_u32(params.var + k, bits_of(div_rn(shared_load_f32(plane + kPlaneBytes + j * 4), all)));
  }
}

}  // namespace fused_resnet
