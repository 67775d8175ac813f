// A warp's share of the product in exact fp32, on the FMA units. Same interface as WarpMma.
#pragma once

#include "addressing.cuh"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

// Lanes form a grid of 4 rows x 8 columns; a lane owns rows 4 apart and columns 8 apart. So the eight lanes
// that one 16-byte shared load serves at a time read one row of a (a broadcast) and eight neighbouring rows
// of b (all banks).
template <class Tile>
class WarpFma {
  static constexpr int kRows = Tile::kWarpM / 4, kColumns = Tile::kWarpN / 8;

 public:
  static constexpr int kFragments =
      kRows * kColumns / 4;  // value (i, j) is acc[v / 4][v % 4], v = i * kColumns + j
  static constexpr int kGroups = kRows, kGroupRows = 4;
  static constexpr int kSlabs = Tile::kDepthBytes / 16;
  static constexpr int kElementBytes = 4;
  static_assert(Tile::kDepthBytes == 128 && kRows % 2 == 0,
                "rows i and i + 2 of a lane have the same swizzle");

  struct Operands {
    Words4 a[kRows];
    Words4 b[kColumns];
  };

  __device__ __forceinline__ WarpFma() {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    lane_row_ = lane / 8;
    lane_column_ = lane % 8;
    row_ = warp / Tile::kWarpsN;
    column_ = warp % Tile::kWarpsN;
    const uint32_t row_a = row_ * Tile::kWarpM + lane_row_, row_b = column_ * Tile::kWarpN + lane_column_;
    a_ = row_a * Tile::kDepthBytes + swizzle<Tile>(row_a) * 16;
    b_ = Tile::kBytesA + row_b * Tile::kDepthBytes + swizzle<Tile>(row_b) * 16;
  }

  __device__ __forceinline__ void load(Operands& to, uint32_t stage, int slab) const {
    const uint32_t a = (stage + a_) ^ (slab * 16), b = (stage + b_) ^ (slab * 16);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {  // four rows on, the swizzle's highest bit is the other one
      to.a[i] = shared_load_16((a ^ (i % 2 * 4 * 16)) + i * 4 * Tile::kDepthBytes);
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) to.b[j] = shared_load_16(b + j * 8 * Tile::kDepthBytes);
  }

  __device__ __forceinline__ void multiply(float (&acc)[kFragments][4], const Operands& operands) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          float& d = acc[(i * kColumns + j) / 4][(i * kColumns + j) % 4];
          d = fma_rn(float_of(operands.a[i].w[e]), float_of(operands.b[j].w[e]), d);
        }
      }
    }
  }

  __device__ __forceinline__ void scale_columns(float (&acc)[kFragments][4], uint32_t factors) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float f = shared_load_f32(factors + (column_ * Tile::kWarpN + lane_column_ + j * 8) * 4);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float& d = acc[(i * kColumns + j) / 4][(i * kColumns + j) % 4];
        d = mul_rn(d, f);
      }
    }
  }

  template <int kFirst, int kCount>
  __device__ __forceinline__ void stage(const float (&acc)[kFragments][4], uint32_t staging,
                                        uint32_t pitch) const {
    const uint32_t lane = staging + (row_ * kCount * kGroupRows + lane_row_) * pitch +
                          (column_ * Tile::kWarpN + lane_column_) * 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int v = (kFirst + i) * kColumns + j;
        shared_store_f32(lane + i * 4 * pitch + j * 32, acc[v / 4][v % 4]);
      }
    }
  }

 private:
  uint32_t a_, b_;  // this lane's first rows at slab 0, relative to the stage
  uint32_t row_, column_, lane_row_, lane_column_;
};

}  // namespace fused_resnet
