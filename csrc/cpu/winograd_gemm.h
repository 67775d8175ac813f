// The micro-kernel: M[t][k] = sum_c V[t][c] * U[c][k] for up to kRows tiles and one panel of output channels,
// held in registers from the first channel to the last.
#pragma once

#include "vec.h"

namespace fused_resnet::cpu {

// The register block. 14 x 32 takes 28 accumulators, 2 weights and 1 broadcast of 32 registers (AVX-512),
// 6 x 16 the same of 16 (AVX2): as many multiply-adds as possible for each load.
template <int kLanes_, int kRows_, int kCols_>
struct RegisterBlock {
  static constexpr int kLanes = kLanes_;
  static constexpr int kRows = kRows_;           // tiles
  static constexpr int kCols = kCols_;           // vectors of output channels
  static constexpr int kPanel = kLanes * kCols;  // output channels
};

// Channels of a tile that lie together. V is [C / kChunk][tile][kChunk], so the distance between two tiles is
// a constant: fourteen addresses are one register and fourteen displacements.
constexpr int kChunk = 16;

template <class Block, int kRows>
void gemm_rows(const float* v, int64_t v_chunk_stride, int64_t chunks, const float* u, const float* next,
               int64_t next_step, float* m, int64_t m_stride) {
  using V = Vec<Block::kLanes>;
  V sum[kRows][Block::kCols] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int c = 0; c < kChunk; ++c) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + next_step / 2);
      next += next_step;
      V weight[Block::kCols];
      unroll<Block::kCols>([&](auto j) FR_LAMBDA {
        weight[j] = load<Block::kLanes>(u + c * Block::kPanel + j * Block::kLanes);
      });
      unroll<kRows>([&](auto row) FR_LAMBDA {
        const float value = v[row * kChunk + c];
        unroll<Block::kCols>([&](auto j) FR_LAMBDA { sum[row][j] += value * weight[j]; });
      });
    }
    v += v_chunk_stride;
    u += kChunk * Block::kPanel;
  }
  unroll<kRows>([&](auto row) FR_LAMBDA {
    unroll<Block::kCols>(
        [&](auto j) FR_LAMBDA { store<Block::kLanes>(m + row * m_stride + j * Block::kLanes, sum[row][j]); });
  });
}

using GemmFunction = void (*)(const float*, int64_t, int64_t, const float*, const float*, int64_t, float*,
                              int64_t);

template <class Block, int... kIndex>
constexpr std::array<GemmFunction, Block::kRows> gemm_functions(std::integer_sequence<int, kIndex...>) {
  return {&gemm_rows<Block, kIndex + 1>...};
}

// All the tiles of a block: groups of nearly equal height, so that none is left with one or two rows, where
// the multiply-adds would wait for one another.
template <class Block>
void gemm_panel(const float* v, int64_t tiles, int64_t chunks, const float* u, const float* next, float* m,
                int64_t m_stride) {
  static constexpr auto kFunctions = gemm_functions<Block>(std::make_integer_sequence<int, Block::kRows>{});
  const int64_t groups = (tiles + Block::kRows - 1) / Block::kRows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = tiles * group / groups, last = tiles * (group + 1) / groups;
    const float* ahead = group == 0 ? next : group == 1 ? next + chunks * kChunk * Block::kPanel / 2 : u;
    kFunctions[last - first - 1](v + first * kChunk, tiles * kChunk, chunks, u, ahead, groups == 1 ? 32 : 16,
                                 m + first * m_stride, m_stride);
  }
}

}  // namespace fused_resnet::cpu
