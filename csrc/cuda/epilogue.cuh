// y = act(scale * acc + shift + residual), in fp32, rounded once.
//
// Accumulators lie scattered over the lanes, so they pass through shared memory (the pipeline's, now free) as
// fp32 rows; then neighbouring lanes take 16 bytes each of one row of y and residual, and every sector is
// touched once, in full.
#pragma once

#include "../conv_params.h"
#include "numbers.cuh"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

// ---- batch norm ----
// Forms scale[k] and shift[k] of the tile's channels from the BN tensors as they are now, in shared memory at
// `norm`: scale0[kN], shift0[kN], and of the projection scale1[kN], shift1[kN]; `thread` is one of kThreads
// that share the work. Visible after the next barrier.
template <class Tile, int kThreads = Tile::kThreads>
__device__ __forceinline__ void load_norm(const ConvParams& params, int channel0, uint32_t norm,
                                          int thread = threadIdx.x) {
  for (int j = thread; j < Tile::kN * params.sources; j += kThreads) {
    const int column = j % Tile::kN, source = j / Tile::kN;
    const ChannelNorm& n = params.norm[source];
    const int k = channel0 + column;
    float scale = 1.0f, shift = 0.0f;
    if (k < params.k) {
      if (n.conv_bias) shift = load_number(n.conv_bias, k, n.conv_bias_dtype);
      if (n.mean) {
        const float gamma = n.weight ? load_number(n.weight, k, n.norm_dtype) : 1.0f;
        const float beta = n.bias ? load_number(n.bias, k, n.norm_dtype) : 0.0f;
        const float centred = add_rn(shift, -load_number(n.mean, k, n.norm_dtype));
        scale = div_rn(gamma, sqrt_rn(add_rn(load_number(n.var, k, n.norm_dtype), n.eps)));
        shift = fma_rn(centred, scale, beta);
      }
    }
    const uint32_t at = norm + (source * 2 * Tile::kN + column) * 4;
    shared_store_f32(at, scale);
    shared_store_f32(at + Tile::kN * 4, shift);
  }
}

// ---- the store ----
template <class Tile, class Warp>
struct Staging {
  static constexpr int kPitch =
      (Tile::kN + 8) * 4;  // 8 floats on: the rows of a fragment fall into different banks
  static constexpr int rows(int groups) { return Tile::kWarpsM * groups * Warp::kGroupRows; }
  static constexpr int groups_that_fit() {
    int groups = Warp::kGroups;
    while (rows(groups) * kPitch > Tile::kPipelineBytes) groups /= 2;
    return groups;
  }
  static constexpr int kGroups = groups_that_fit();  // of each warp, staged at once
  static constexpr int kPasses = Warp::kGroups / kGroups;
  static constexpr int kRows = rows(kGroups);
  static_assert(Warp::kGroups % kGroups == 0, "whole passes");

  // Row of the tile that lies at row `staged` in pass `pass`.
  __device__ __forceinline__ static int tile_row(int staged, int pass) {
    constexpr int kWarpRows = kGroups * Warp::kGroupRows;
    return staged / kWarpRows * Tile::kWarpM + pass * kWarpRows + staged % kWarpRows;
  }
};

// Finishes the staged rows, kCount channels a thread.
template <class Tile, class Warp, int kCount>
__device__ __forceinline__ void store_rows(const ConvParams& params, int pixel0, int channel0, int pass,
                                           uint32_t staging, uint32_t norm) {
  using S = Staging<Tile, Warp>;
  constexpr int kLanes = Tile::kN / kCount, kRowsAtOnce = Tile::kThreads / kLanes;
  constexpr int kTurns = S::kRows / kRowsAtOnce,
                kBatch = kTurns < 4 ? kTurns : 4;  // residuals under way at a time
  static_assert(S::kRows % kRowsAtOnce == 0 && kTurns % kBatch == 0, "whole turns");
  const int column = static_cast<int>(threadIdx.x) % kLanes * kCount,
            row = static_cast<int>(threadIdx.x) / kLanes;
  const int channel = channel0 + column;
  if (channel >= params.k) return;

  float scale[kCount], shift[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t at = norm + (column + i) * 4;
    scale[i] = shared_load_f32(at);
    shift[i] = shared_load_f32(at + Tile::kN * 4);
    if (params.sources == 2) {  // both sums are scaled already
      scale[i] = 1.0f;
      shift[i] = add_rn(shift[i], shared_load_f32(at + 3 * Tile::kN * 4));
    }
  }

#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn += kBatch) {
    Words4 residual[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int pixel = pixel0 + S::tile_row(row + (turn + b) * kRowsAtOnce, pass);
      residual[b] = {};
      if (params.residual && pixel < params.pixels) {
        residual[b] = load_packet<kCount>(params.residual, static_cast<int64_t>(pixel) * params.k + channel,
                                          params.residual_dtype);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int staged = row + (turn + b) * kRowsAtOnce;
      const int pixel = pixel0 + S::tile_row(staged, pass);
      const uint32_t from = staging + staged * S::kPitch + column * 4;
      float v[kCount];
      if constexpr (kCount == 1) {
        v[0] = shared_load_f32(from);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
          const Words4 words = shared_load_16(from + i * 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) v[i + e] = float_of(words.w[e]);
        }
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        v[i] = fma_rn(v[i], scale[i], shift[i]);
        if (params.residual) v[i] = add_rn(v[i], unpack<kCount>(residual[b], i, params.residual_dtype));
        v[i] = activate(v[i], params.activation);
      }
      if (pixel < params.pixels) {
        const int dtype = kCount == 4 ? kFloat32 : params.y_dtype;  // the planner's promise
        store_packet<kCount>(params.y, static_cast<int64_t>(pixel) * params.k + channel,
                             pack_packet<kCount>(v, dtype), dtype);
      }
    }
  }
}

// Stages the groups of pass `pass`; the choice among passes is made once per block, not per element.
template <class Tile, class Warp, int kPass = 0>
__device__ __forceinline__ void stage_pass(const float (&acc)[Warp::kFragments][4], const Warp& warp,
                                           int pass, uint32_t staging) {
  using S = Staging<Tile, Warp>;
  if (pass == kPass) {
    warp.template stage<kPass * S::kGroups, S::kGroups>(acc, staging, S::kPitch);
  } else if constexpr (kPass + 1 < S::kPasses) {
    stage_pass<Tile, Warp, kPass + 1>(acc, warp, pass, staging);
  }
}

template <class Tile, class Warp>
__device__ __forceinline__ void store_tile(const ConvParams& params, const float (&acc)[Warp::kFragments][4],
                                           const Warp& warp, int pixel0, int channel0, uint32_t staging,
                                           uint32_t norm) {
  enter_epilogue();
#pragma unroll 1
  for (int pass = 0; pass < Staging<Tile, Warp>::kPasses; ++pass) {
    if (pass > 0) __syncthreads();  // the previous pass has been read
    stage_pass<Tile, Warp>(acc, warp, pass, staging);
    __syncthreads();
    if (params.y_vector == 8) {
      store_rows<Tile, Warp, 8>(params, pixel0, channel0, pass, staging, norm);
    } else if (params.y_vector == 4) {
      store_rows<Tile, Warp, 4>(params, pixel0, channel0, pass, staging, norm);
    } else {
      store_rows<Tile, Warp, 1>(params, pixel0, channel0, pass, staging, norm);
    }
  }
}

}  // namespace fused_resnet
