// A warp's share of the product on tensor cores.
#pragma once

#include "addressing.cuh"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

// Accumulators are kept as acc[kFragments][4]. To the epilogue, fragments come in kGroups groups, each
// covering kGroupRows consecutive rows of the warp tile (all its columns): it can stage any number of groups
// at a time.
template <class Tile, Math kMath>
class WarpMma {
 public:
  static constexpr int kGroups = Tile::kWarpM / 16, kGroupRows = 16;
  static constexpr int kGroupFragments = Tile::kWarpN / 8;
  static constexpr int kFragments = kGroups * kGroupFragments;
  static constexpr int kSlabs = Tile::kDepthBytes / 32;  // one mma is 32 bytes deep: 16 halves or 8 floats
  static constexpr int kElementBytes = kMath == Math::kTensorFloat32 ? 4 : 2;
  static_assert(Tile::kWarpM % 16 == 0 && Tile::kWarpN % 16 == 0, "fragments are loaded 16 rows at a time");

  struct Operands {
    uint32_t a[kGroups][4];
    uint32_t b[kGroupFragments / 2][4];
  };

  __device__ __forceinline__ WarpMma() {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    lane_row_ = lane / 4;
    lane_column_ = lane % 4 * 2;
    row_ = warp / Tile::kWarpsN;
    column_ = warp % Tile::kWarpsN;
    // Matrices in the order of the registers: for a, rows 0-7 and 8-15, then the same 16 bytes on; for b, 16
    // bytes and the next 16 of channels 0-7, then of channels 8-15.
    const uint32_t row_a = row_ * Tile::kWarpM + lane % 16, chunk_a = lane / 16;
    const uint32_t row_b = column_ * Tile::kWarpN + lane % 8 + lane / 16 * 8, chunk_b = lane / 8 % 2;
    a_ = row_a * Tile::kDepthBytes + (chunk_a ^ swizzle<Tile>(row_a)) * 16;
    b_ = Tile::kBytesA + row_b * Tile::kDepthBytes + (chunk_b ^ swizzle<Tile>(row_b)) * 16;
  }

  __device__ __forceinline__ void load(Operands& to, uint32_t stage, int slab) const {
    // A stage begins at a multiple of 128, so the slab (two chunks) may be added to the swizzled chunk by
    // xor.
    const uint32_t a = (stage + a_) ^ (slab * 32), b = (stage + b_) ^ (slab * 32);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) ldmatrix_x4(to.a[i], a + i * 16 * Tile::kDepthBytes);
#pragma unroll
    for (int j = 0; j < kGroupFragments / 2; ++j) ldmatrix_x4(to.b[j], b + j * 16 * Tile::kDepthBytes);
  }

  __device__ __forceinline__ void multiply(float (&acc)[kFragments][4], Operands& operands) const {
    if constexpr (kMath == Math::kTensorFloat32) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) operands.a[i][e] = round_to_tf32(operands.a[i][e]);
      }
#pragma unroll
      for (int j = 0; j < kGroupFragments / 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) operands.b[j][e] = round_to_tf32(operands.b[j][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < kGroupFragments; ++j) {
        float (&d)[4] = acc[i * kGroupFragments + j];
        const uint32_t b0 = operands.b[j / 2][j % 2 * 2], b1 = operands.b[j / 2][j % 2 * 2 + 1];
        if constexpr (kMath == Math::kFloat16) mma_f16(d, operands.a[i], b0, b1);
        if constexpr (kMath == Math::kBFloat16) mma_bf16(d, operands.a[i], b0, b1);
        if constexpr (kMath == Math::kTensorFloat32) mma_tf32(d, operands.a[i], b0, b1);
      }
    }
  }

  // acc *= factor of its column; `factors` is the shared address of the tile's kN floats.
  __device__ __forceinline__ void scale_columns(float (&acc)[kFragments][4], uint32_t factors) const {
#pragma unroll
    for (int j = 0; j < kGroupFragments; ++j) {
      const uint32_t column = column_ * Tile::kWarpN + j * 8 + lane_column_;
      const float f0 = shared_load_f32(factors + column * 4), f1 = shared_load_f32(factors + column * 4 + 4);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        float (&d)[4] = acc[i * kGroupFragments + j];
        d[0] = mul_rn(d[0], f0);
        d[1] = mul_rn(d[1], f1);
        d[2] = mul_rn(d[2], f0);
        d[3] = mul_rn(d[3], f1);
      }
    }
  }

  // Writes groups [kFirst, kFirst + kCount) as fp32 rows of `pitch` bytes; the warps lie below one another.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void stage(const float (&acc)[kFragments][4], uint32_t staging,
                                        uint32_t pitch) const {
    const uint32_t lane = staging + (row_ * kCount * kGroupRows + lane_row_) * pitch +
                          (column_ * Tile::kWarpN + lane_column_) * 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < kGroupFragments; ++j) {
        const float (&d)[4] = acc[(kFirst + i) * kGroupFragments + j];
        shared_store_f32x2(lane + i * 16 * pitch + j * 32, d[0], d[1]);
        shared_store_f32x2(lane + (i * 16 + 8) * pitch + j * 32, d[2], d[3]);
      }
    }
  }

 private:
  uint32_t a_, b_;  // this lane's rows of slab 0, relative to the stage
  uint32_t row_, column_, lane_row_, lane_column_;
};

}  // namespace fused_resnet
