// F(m x m, 3 x 3) with weights that are kept as they are and transformed each time they are used.
//
//   W [panel][C][9][kPanel]           the weights, in the order in which they are read
//   U [2][position][slab][kPanel]     transformed weights: one slab of channels in use, one in the making
//   M [position][tile][kPanel]        products of one panel
//
// Transformed weights are 36 or 16 values for 9, and a network's do not fit in any cache: where there are few
// tiles to share them, fetching them takes longer than multiplying. Transforming them here is cheaper if it
// keeps out of the way: a few channels of the next slab after each micro-kernel, few enough for their stores
// to wait in the store buffer while the next micro-kernel computes. (All of a slab at once takes three times
// as long, since the stores then wait for the second-level cache.)
#pragma once

#include "winograd_kernel.h"

namespace fused_resnet::cpu {

template <class Block, class W>
struct FreshWinogradImpl {
  using Stored = WinogradImpl<Block, W>;
  using V = typename Stored::V;
  static constexpr int kLanes = Block::kLanes, kPanel = Block::kPanel, kTile = W::kTile;
  static constexpr int kPositions = W::kPositions;
  static constexpr int64_t kTaps = 9;
  static constexpr int64_t kSlab = 4;  // chunks
  static constexpr int64_t kUPosition = kSlab * kChunk * kPanel + 2 * Stored::kSkew;

  static int64_t padded(int64_t c) { return ceil_div(c, kChunk) * kChunk; }
  static int64_t weight_floats(const ConvShape& shape) {
    return ceil_div(shape.k, kPanel) * padded(shape.c) * kTaps * kPanel;
  }

  static void pack_weights(const ConvShape& shape, const float* weight, const int64_t stride[4],
                           int64_t first_panel, int64_t last_panel, float* packed) {
    const int64_t panel_floats = padded(shape.c) * kTaps * kPanel;
    std::fill(packed + first_panel * panel_floats, packed + last_panel * panel_floats, 0.0f);
    const int64_t k_end = std::min(last_panel * kPanel, shape.k);
    for (int64_t k = first_panel * kPanel; k < k_end; ++k) {
      float* out = packed + k / kPanel * panel_floats + k % kPanel;
      for (int64_t c = 0; c < shape.c; ++c) {
        const float* g = weight + k * stride[0] + c * stride[1];
        for (int64_t tap = 0; tap < kTaps; ++tap, out += kPanel)
          *out = g[tap / 3 * stride[2] + tap % 3 * stride[3]];
      }
    }
  }

  // U = G g G^T for channels [begin, end) of a slab.
  static void transform_weights(const float* slab, int64_t begin, int64_t end, float* u) {
    for (int64_t c = begin; c < end; ++c) {
      const float* g = slab + c * kTaps * kPanel;
      unroll<Block::kCols>([&](auto col) FR_LAMBDA {
        constexpr int kOffset = decltype(col)::value * kLanes;
        V half[kTile][3];  // G g
        unroll<3>([&](auto s) FR_LAMBDA {
          filter_transform<W, V>([&](auto r)
                                     FR_LAMBDA { return load<kLanes>(g + (r * 3 + s) * kPanel + kOffset); },
                                 [&](auto i, V value) FR_LAMBDA { half[i][s] = value; });
        });
        unroll<kTile>([&](auto i) FR_LAMBDA {
          filter_transform<W, V>([&](auto s) FR_LAMBDA { return half[i][s]; },
                                 [&](auto j, V value) FR_LAMBDA {
                                   store<kLanes>(u + (i * kTile + j) * kUPosition + c * kPanel + kOffset,
                                                 value);
                                 });
        });
      });
    }
  }

  static ConvPlan plan(const ConvShape& shape, int threads) {
    // Each block of tiles transforms the weights again: one block, unless V would outgrow the cache.
    const int64_t fitting =
        level2_cache_bytes() / int64_t(sizeof(float)) / 2 / (kPositions * (padded(shape.c) + kPanel));
    ConvPlan plan = cut(Stored::tiles_of(shape), std::max<int64_t>(fitting, Block::kRows),
                        ceil_div(shape.k, kPanel), threads, false);
    plan.scratch_floats =
        padded(shape.c) + kPositions * (Stored::v_stride(shape.c, plan.rows_per_block) +
                                        Stored::m_stride(1, plan.rows_per_block) + 2 * kUPosition);
    return plan;
  }

  static void run_piece(const ConvProblem& problem, const ConvPlan& plan, int64_t piece, float* scratch) {
    const int64_t first_tile = piece / plan.k_blocks * plan.rows_per_block;
    const int64_t tiles = std::min(plan.rows_per_block, plan.rows - first_tile);
    const int64_t first_panel = piece % plan.k_blocks * plan.panels_per_block;
    const int64_t last_panel = std::min(first_panel + plan.panels_per_block, plan.panels);
    const int64_t c = padded(problem.shape.c), chunks = c / kChunk;
    const int64_t v_position = Stored::v_stride(c, tiles), m_position = Stored::m_stride(1, tiles);
    float* zeros = scratch;
    float* v = zeros + c;
    float* m = v + kPositions * v_position;
    float* u = m + kPositions * m_position;  // in use
    float* u_next = u + kPositions * kUPosition;

    Stored::transform_inputs(problem, first_tile, tiles, zeros, v);
    const int64_t calls = kPositions * ceil_div(tiles, Block::kRows);  // of micro-kernels for each slab
    const float* slab = problem.weights + first_panel * c * kTaps * kPanel;
    const float* end = problem.weights + last_panel * c * kTaps * kPanel;
    transform_weights(slab, 0, std::min(kSlab, chunks) * kChunk, u);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      for (int64_t chunk = 0; chunk < chunks; chunk += kSlab) {
        const int64_t count = std::min(kSlab, chunks - chunk);
        slab += count * kChunk * kTaps * kPanel;  // the next one
        const int64_t left = chunk + count < chunks ? chunks - chunk - count : chunks;
        const int64_t channels = slab < end ? std::min(kSlab, left) * kChunk : 0;
        const int64_t step = ceil_div(channels, calls) * kTaps * kPanel / kSlab;
        int64_t call = 0, done = 0;
        for (int position = 0; position < kPositions; ++position) {
          for_groups<Block, StoreProducts>(tiles, [&](auto kernel, int64_t first, int64_t, int64_t) {
            // What will be transformed two calls from now is fetched.
            const int64_t soon = channels * (call + 2) / calls;
            kernel(v + position * v_position + (chunk * tiles + first) * kChunk, tiles * kChunk, count,
                   u + position * kUPosition, Ahead{slab + soon * kTaps * kPanel, step},
                   m + position * m_position + first * kPanel, kPanel, chunk != 0);
            const int64_t until = channels * ++call / calls;
            transform_weights(slab, done, until, u_next);
            done = until;
          });
        }
        std::swap(u, u_next);
      }
      Stored::transform_outputs(problem, first_tile, tiles, m, m_position, panel, panel + 1);
    }
  }

  static constexpr ConvKernel kernel() { return {kPanel, &weight_floats, &pack_weights, &plan, &run_piece}; }
};

}  // namespace fused_resnet::cpu
