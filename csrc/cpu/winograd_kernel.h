// F(m x m, 3 x 3) for one instruction set: input transform, one GEMM per position, output transform, on a
// block of tiles that stays in the second-level cache in between.
//
//   V [position][C / kChunk][tile][kChunk]     transformed input of the block
//   U [panel][position][C][kPanel]             transformed weights, in the order in which they are read
//   M [position][tile][panels_per_block * kPanel]
#pragma once

#include <algorithm>
#include <array>

#include "activate.h"
#include "memory.h"
#include "winograd.h"
#include "winograd_gemm.h"
#include "winograd_transforms.h"

namespace fused_resnet::cpu {

template <class Block, class W>
struct WinogradImpl {
  static constexpr int kLanes = Block::kLanes, kPanel = Block::kPanel, kM = W::kM, kTile = W::kTile;
  static constexpr int kPositions = W::kPositions;
  static constexpr int64_t kSkew = 16;  // keeps the positions' rows out of one another's cache sets
  using V = Vec<kLanes>;

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t chunks_of(int64_t c) { return ceil_div(c, kChunk); }
  static int64_t panel_floats(int64_t c) { return kPositions * chunks_of(c) * kChunk * kPanel; }
  static int64_t weight_floats(int64_t c, int64_t k) { return ceil_div(k, kPanel) * panel_floats(c); }
  static int64_t v_stride(int64_t c, int64_t tiles) { return chunks_of(c) * tiles * kChunk + kSkew; }
  static int64_t m_stride(int64_t panels, int64_t tiles) { return tiles * panels * kPanel + kSkew; }

  // U = G g G^T for panels [first, last), in double precision and rounded once. Channels beyond C and K are
  // zero.
  //
  // (Transforming the weights anew in each call, to read 9 values instead of 36, was tried: the 36 stores
  // outweigh the traffic they save except at 512 channels and batch 8.)
  static void transform_weights(const float* weight, const int64_t stride[4], int64_t c, int64_t k,
                                int64_t first_panel, int64_t last_panel, float* packed) {
    const int64_t padded_c = chunks_of(c) * kChunk;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      float* out = packed + panel * panel_floats(c);
      for (int64_t ci = 0; ci < padded_c; ++ci) {
        for (int64_t ki = 0; ki < kPanel; ++ki) {
          const int64_t channel = panel * kPanel + ki;
          double u[kTile][kTile] = {};
          if (ci < c && channel < k) {
            const float* g = weight + channel * stride[0] + ci * stride[1];
            double rows[kTile][3];
            for (int i = 0; i < kTile; ++i) {
              for (int j = 0; j < 3; ++j) {
                rows[i][j] = W::kFilter[i][0] * g[j * stride[3]] +
                             W::kFilter[i][1] * g[stride[2] + j * stride[3]] +
                             W::kFilter[i][2] * g[2 * stride[2] + j * stride[3]];
              }
            }
            for (int i = 0; i < kTile; ++i) {
              for (int j = 0; j < kTile; ++j) {
                u[i][j] = W::kFilter[j][0] * rows[i][0] + W::kFilter[j][1] * rows[i][1] +
                          W::kFilter[j][2] * rows[i][2];
              }
            }
          }
          for (int position = 0; position < kPositions; ++position) {
            out[(position * padded_c + ci) * kPanel + ki] = float(u[position / kTile][position % kTile]);
          }
        }
      }
    }
  }

  // V = B^T d B for the channels of one tile. Pixels outside the image are read from `zeros`.
  static void transform_input(const WinogradProblem& problem, int64_t tile, const float* zeros, float* v,
                              int64_t v_position, int64_t v_chunk) {
    const int64_t columns = ceil_div(problem.q, kM), rows = ceil_div(problem.p, kM);
    const int64_t image = tile / (rows * columns);
    const int64_t top = tile / columns % rows * kM - problem.pad_h,
                  left = tile % columns * kM - problem.pad_w;
    const float* pixels[kTile][kTile];
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = y >= 0 && y < problem.h && x >= 0 && x < problem.w;
        pixels[i][j] = inside ? problem.x + image * problem.x_stride[0] + y * problem.x_stride[1] +
                                    x * problem.x_stride[2]
                              : zeros;
      }
    }
    const int64_t padded_c = chunks_of(problem.c) * kChunk, whole = problem.c / kLanes * kLanes;
    for (int64_t c = 0; c < padded_c; c += kLanes) {
      float* out = v + c / kChunk * v_chunk + c % kChunk;
      if (c < whole) {
        transform_channels(out, v_position,
                           [&](int i, int j) FR_LAMBDA { return load<kLanes>(pixels[i][j] + c); });
      } else {
        const int64_t left_over = std::max<int64_t>(problem.c - c, 0);
        transform_channels(out, v_position, [&](int i, int j) FR_LAMBDA {
          return load_partial<kLanes>(pixels[i][j] + c, left_over);
        });
      }
    }
  }

  template <class Pixel>
  static FR_INLINE void transform_channels(float* out, int64_t v_position, Pixel&& pixel) {
    V half[kTile][kTile];  // B^T d
    unroll<kTile>([&](auto j) FR_LAMBDA {
      input_transform<W, V>([&](auto i) FR_LAMBDA { return pixel(i, j); },
                            [&](auto i, V value) FR_LAMBDA { half[i][j] = value; });
    });
    unroll<kTile>([&](auto i) FR_LAMBDA {
      input_transform<W, V>([&](auto j) FR_LAMBDA { return half[i][j]; },
                            [&](auto j, V value)
                                FR_LAMBDA { store<kLanes>(out + (i * kTile + j) * v_position, value); });
    });
  }

  // Y = A^T M A, then scale, shift, residual and activation, for one tile and one vector of output channels.
  template <Activation kActivation, bool kResidual, bool kWhole>
  static FR_INLINE void finish_channels(const float* m, int64_t m_position, V scale, V shift, float* y,
                                        const int64_t* y_stride, const float* residual,
                                        const int64_t* residual_stride, int64_t rows, int64_t columns,
                                        int64_t channels) {
    V half[kM][kTile];  // A^T M
    unroll<kTile>([&](auto j) FR_LAMBDA {
      output_transform<W, V>([&](auto i) FR_LAMBDA { return load<kLanes>(m + (i * kTile + j) * m_position); },
                             [&](auto i, V value) FR_LAMBDA { half[i][j] = value; });
    });
    unroll<kM>([&](auto i) FR_LAMBDA {
      if (i >= rows) return;
      output_transform<W, V>([&](auto j) FR_LAMBDA { return half[i][j]; },
                             [&](auto j, V value) FR_LAMBDA {
                               if (j >= columns) return;
                               value = value * scale + shift;
                               if constexpr (kResidual) {
                                 const float* from =
                                     residual + i * residual_stride[1] + j * residual_stride[2];
                                 value += kWhole ? load<kLanes>(from) : load_partial<kLanes>(from, channels);
                               }
                               value = activate<kActivation>(value);
                               float* to = y + i * y_stride[1] + j * y_stride[2];
                               if constexpr (kWhole) {
                                 store<kLanes>(to, value);
                               } else {
                                 store_partial<kLanes>(to, value, channels);
                               }
                             });
    });
  }

  template <Activation kActivation, bool kResidual>
  static void transform_output(const WinogradProblem& problem, int64_t tile, const float* m,
                               int64_t m_position, int64_t k_begin, int64_t k_end) {
    const int64_t tile_columns = ceil_div(problem.q, kM), tile_rows = ceil_div(problem.p, kM);
    const int64_t image = tile / (tile_rows * tile_columns);
    const int64_t top = tile / tile_columns % tile_rows * kM, left = tile % tile_columns * kM;
    const int64_t rows = std::min<int64_t>(problem.p - top, kM),
                  columns = std::min<int64_t>(problem.q - left, kM);
    float* y =
        problem.y + image * problem.y_stride[0] + top * problem.y_stride[1] + left * problem.y_stride[2];
    const float* residual = nullptr;
    if constexpr (kResidual) {
      residual = problem.residual + image * problem.residual_stride[0] + top * problem.residual_stride[1] +
                 left * problem.residual_stride[2];
    }
    for (int64_t k = k_begin; k < k_end; k += kLanes) {
      const V scale = load<kLanes>(problem.scale + k), shift = load<kLanes>(problem.shift + k);
      const float* from = kResidual ? residual + k : nullptr;
      if (k + kLanes <= k_end) {
        finish_channels<kActivation, kResidual, true>(m + k - k_begin, m_position, scale, shift, y + k,
                                                      problem.y_stride, from, problem.residual_stride, rows,
                                                      columns, kLanes);
      } else {
        finish_channels<kActivation, kResidual, false>(m + k - k_begin, m_position, scale, shift, y + k,
                                                       problem.y_stride, from, problem.residual_stride, rows,
                                                       columns, k_end - k);
      }
    }
  }

  using Output = void (*)(const WinogradProblem&, int64_t, const float*, int64_t, int64_t, int64_t);
  static Output output_function(const WinogradProblem& problem) {
    const bool residual = problem.residual != nullptr;
    switch (problem.activation) {
      case Activation::kRelu:
        return residual ? &transform_output<Activation::kRelu, true>
                        : &transform_output<Activation::kRelu, false>;
      case Activation::kRelu6:
        return residual ? &transform_output<Activation::kRelu6, true>
                        : &transform_output<Activation::kRelu6, false>;
      default:
        return residual ? &transform_output<Activation::kNone, true>
                        : &transform_output<Activation::kNone, false>;
    }
  }

  static WinogradPlan plan(const WinogradProblem& problem, int threads) {
    WinogradPlan plan;
    plan.tiles = problem.n * ceil_div(problem.p, kM) * ceil_div(problem.q, kM);
    plan.panels = ceil_div(problem.k, kPanel);
    const int64_t cache_floats = level2_cache_bytes() / int64_t(sizeof(float));
    const int64_t padded_c = chunks_of(problem.c) * kChunk;
    // V and M of a block take a quarter of the cache: weights pass through the rest. Where the weights come
    // from beyond it each time, a block has up to three groups of tiles to make use of them.
    const bool weights_stay = weight_floats(problem.c, problem.k) <= 2 * cache_floats;
    const int64_t fitting = cache_floats / 4 / (kPositions * (padded_c + plan.panels * kPanel));
    const int64_t most = std::max<int64_t>(fitting, (weights_stay ? 1 : 3) * Block::kRows);
    plan.tile_blocks = ceil_div(plan.tiles, most);
    if (plan.tile_blocks > 1) plan.tile_blocks = ceil_div(plan.tile_blocks, threads) * threads;
    plan.tiles_per_block = ceil_div(plan.tiles, plan.tile_blocks);
    plan.tile_blocks = ceil_div(plan.tiles, plan.tiles_per_block);
    // Too few blocks of tiles for the threads: the output channels are shared out as well, and the input
    // transform, a small part of the work, is repeated.
    plan.k_blocks = std::min(plan.panels, ceil_div(threads, plan.tile_blocks));
    plan.panels_per_block = ceil_div(plan.panels, plan.k_blocks);
    plan.k_blocks = ceil_div(plan.panels, plan.panels_per_block);
    plan.scratch_floats = kPositions * (v_stride(problem.c, plan.tiles_per_block) +
                                        m_stride(plan.panels_per_block, plan.tiles_per_block)) +
                          padded_c;
    return plan;
  }

  static void run_piece(const WinogradProblem& problem, const WinogradPlan& plan, int64_t piece,
                        float* scratch) {
    const int64_t first_tile = piece / plan.k_blocks * plan.tiles_per_block;
    const int64_t tiles = std::min(plan.tiles_per_block, plan.tiles - first_tile);
    const int64_t first_panel = piece % plan.k_blocks * plan.panels_per_block;
    const int64_t last_panel = std::min(first_panel + plan.panels_per_block, plan.panels);
    const int64_t chunks = chunks_of(problem.c), v_position = v_stride(problem.c, tiles);
    float* zeros = scratch;
    float* v = zeros + chunks * kChunk;
    float* m = v + kPositions * v_stride(problem.c, plan.tiles_per_block);

    std::fill_n(zeros, chunks * kChunk, 0.0f);
    for (int64_t t = 0; t < tiles; ++t) {
      transform_input(problem, first_tile + t, zeros, v + t * kChunk, v_position, tiles * kChunk);
    }
    const int64_t m_tile = (last_panel - first_panel) * kPanel,
                  m_position = m_stride(last_panel - first_panel, tiles);
    for (int position = 0; position < kPositions; ++position) {
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const float* u =
            problem.weights + panel * panel_floats(problem.c) + position * chunks * kChunk * kPanel;
        // What is read next, to be fetched meanwhile: this position of the next panel, or the next position.
        const float* next = panel + 1 < last_panel ? u + panel_floats(problem.c)
                                                   : u - (panel - first_panel) * panel_floats(problem.c) +
                                                         chunks * kChunk * kPanel;
        gemm_panel<Block>(v + position * v_position, tiles, chunks, u, next,
                          m + position * m_position + (panel - first_panel) * kPanel, m_tile);
      }
    }
    const Output transform_output = output_function(problem);
    const int64_t k_begin = first_panel * kPanel, k_end = std::min(last_panel * kPanel, problem.k);
    for (int64_t t = 0; t < tiles; ++t) {
      transform_output(problem, first_tile + t, m + t * m_tile, m_position, k_begin, k_end);
    }
  }

  static constexpr WinogradKernel kernel() {
    return {kM, kPanel, &weight_floats, &transform_weights, &plan, &run_piece};
  }
};

}  // namespace fused_resnet::cpu
