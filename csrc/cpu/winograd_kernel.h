// F(m x m, 3 x 3) for one instruction set: input transform, one GEMM per position, output transform, on a
// block of tiles that stays in the second-level cache in between.
//
//   V [position][C / kChunk][tile][kChunk]           transformed input of the block
//   U [position][panel][C][kPanel]                   transformed weights, in the order in which they are read
//   M [position][tile][panels_per_block * kPanel]    products
//
// U, V and M are float32 where the activations are bfloat16 as well: with a quarter of the multiply-adds,
// F(4x4) is as fast as pairs of bfloat16, and what it rounds is far below the rounding of its output.
#pragma once

#include <algorithm>

#include "finish.h"
#include "gemm.h"
#include "memory.h"
#include "winograd_filter.h"
#include "winograd_transforms.h"

namespace fused_resnet::cpu {

template <class Block, class W>
struct WinogradImpl {
  static constexpr int kLanes = Block::kLanes, kPanel = Block::kPanel, kM = W::kM, kTile = W::kTile;
  static constexpr int kPositions = W::kPositions;
  static constexpr int64_t kSkew = 16;  // keeps the positions' rows out of one another's cache sets
  using V = Vec<kLanes>;
  using Element = typename Block::Element;

  static int64_t chunks_of(int64_t c) { return ceil_div(c, kChunk); }
  static int64_t weight_floats(const ConvShape& shape) {
    return kPositions * ceil_div(shape.k, kPanel) * chunks_of(shape.c) * kChunk * kPanel;
  }
  static int64_t v_stride(int64_t c, int64_t tiles) { return chunks_of(c) * tiles * kChunk + kSkew; }
  static int64_t m_stride(int64_t panels, int64_t tiles) { return tiles * panels * kPanel + kSkew; }

  // U = G g G^T. Channels beyond C and K are zero.
  static void pack_weights(const ConvShape& shape, const float* weight, const int64_t stride[4],
                           int64_t first_panel, int64_t last_panel, float* packed) {
    const int64_t c_padded = chunks_of(shape.c) * kChunk, u_panel = c_padded * kPanel;
    const int64_t u_position = ceil_div(shape.k, kPanel) * u_panel;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      FilterTransform<Block, W>::pack_panel(weight + panel * kPanel * stride[0], stride,
                                            std::min<int64_t>(shape.k - panel * kPanel, kPanel), shape.c,
                                            c_padded, kPanel, packed + panel * u_panel, u_position);
    }
  }

  // Where a tile lies in the output.
  struct Place {
    int64_t image, top, left;
    Place(const ConvShape& shape, int64_t tile) {
      const int64_t columns = ceil_div(shape.q, kM), rows = ceil_div(shape.p, kM);
      image = tile / (rows * columns);
      top = tile / columns % rows * kM;
      left = tile % columns * kM;
    }
  };

  // Where a tile's pixels lie; those outside the image are read from `zeros`.
  static void find_pixels(const ConvProblem& problem, int64_t tile, const Element* zeros,
                          const Element* (&pixels)[kTile][kTile]) {
    const ConvShape& shape = problem.shape;
    const Place place(shape, tile);
    const Element* image = problem.input<Element>() + place.image * problem.x_stride[0];
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) {
        const int64_t h = place.top - shape.pad_h + i, w = place.left - shape.pad_w + j;
        const bool inside = h >= 0 && h < shape.h && w >= 0 && w < shape.w;
        pixels[i][j] = inside ? image + h * problem.x_stride[1] + w * problem.x_stride[2] : zeros;
      }
    }
  }

  // Whether activations come from beyond the second-level cache. Then a tile's are fetched while the tile
  // before is transformed: 5 % of the whole at batch 8. From the cache itself it would cost 2 %.
  static bool fetches(const ConvShape& shape) {
    const int64_t values = shape.n * (shape.h * shape.w * shape.c + shape.p * shape.q * shape.k);
    return values * int64_t(sizeof(Element)) > 2 * level2_cache_bytes();
  }
  static FR_INLINE void fetch_pixels(const Element* const (&pixels)[kTile][kTile], int64_t c) {
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kTile; ++j) __builtin_prefetch(pixels[i][j] + c);
    }
  }

  // transform(tile, pixels, those of the next tile) for tiles [first, last).
  template <class Transform>
  static FR_INLINE void for_pixels(const ConvProblem& problem, int64_t first, int64_t last,
                                   const Element* zeros, Transform&& transform) {
    const Element* pixels[2][kTile][kTile];
    find_pixels(problem, first, zeros, pixels[0]);
    for (int64_t tile = first; tile < last; ++tile) {
      auto &now = pixels[(tile - first) % 2], &next = pixels[(tile - first + 1) % 2];
      find_pixels(problem, std::min(tile + 1, tiles_of(problem.shape) - 1), zeros, next);
      transform(tile, now, next);
    }
  }

  // V = B^T d B for the channels of one tile.
  static void transform_input(const ConvShape& shape, const Element* const (&pixels)[kTile][kTile],
                              const Element* const (&next)[kTile][kTile], bool fetch, const Element* zeros,
                              float* v, int64_t v_position, int64_t v_chunk) {
    const int64_t padded_c = chunks_of(shape.c) * kChunk, whole = shape.c / kLanes * kLanes;
    for (int64_t c = 0; c < padded_c; c += kLanes) {
      float* out = v + c / kChunk * v_chunk + c % kChunk;
      if (fetch) fetch_pixels(next, c);
      if (c < whole) {
        transform_channels(out, v_position,
                           [&](int i, int j) FR_LAMBDA { return load<kLanes>(pixels[i][j] + c); });
      } else {
        const int64_t rest = std::max<int64_t>(shape.c - c, 0);
        transform_channels(out, v_position, [&](int i, int j) FR_LAMBDA {
          return load_partial<kLanes>(rest > 0 ? pixels[i][j] + c : zeros, rest);
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

  // Y = A^T M A and the epilogue, for one tile and one vector of output channels; y and residual point at its
  // first pixel.
  template <class S, Lanes kWhich>
  static FR_INLINE void finish_channels(const ConvProblem& problem, const float* m, int64_t m_position,
                                        V scale, V shift, Bounds bounds, const Element* residual, Element* y,
                                        int64_t rows, int64_t columns, int64_t count) {
    constexpr bool kResidual = S::kResidual == Residual::kSome;
    V half[kM][kTile];  // A^T M
    unroll<kTile>([&](auto j) FR_LAMBDA {
      output_transform<W, V>([&](auto i) FR_LAMBDA { return load<kLanes>(m + (i * kTile + j) * m_position); },
                             [&](auto i, V value) FR_LAMBDA { half[i][j] = value; });
    });
    unroll<kM>([&](auto i) FR_LAMBDA {
      if (i >= rows) return;
      const Element* residual_row = residual + (kResidual ? i * problem.residual_stride[1] : 0);
      Element* y_row = y + i * problem.y_stride[1];
      output_transform<W, V>([&](auto j) FR_LAMBDA { return half[i][j]; },
                             [&](auto j, V value) FR_LAMBDA {
                               if (j >= columns) return;
                               finish<S, kLanes, kWhich>(
                                   value, scale, shift, bounds,
                                   residual_row + (kResidual ? j * problem.residual_stride[2] : 0),
                                   y_row + j * problem.y_stride[2], count);
                             });
    });
  }

  // Where a tile's outputs and residual lie.
  struct Outputs {
    const ConvProblem* problem;
    int64_t rows, columns;
    Element* y;
    const Element* residual;
    Outputs(const ConvProblem& p, int64_t tile) : problem(&p) {
      const Place at(p.shape, tile);
      const auto offset = [&](const int64_t stride[3]) {
        return at.image * stride[0] + at.top * stride[1] + at.left * stride[2];
      };
      rows = std::min<int64_t>(p.shape.p - at.top, kM), columns = std::min<int64_t>(p.shape.q - at.left, kM);
      y = p.output<Element>() + offset(p.y_stride);
      residual = p.residual ? p.added<Element>() + offset(p.residual_stride) : nullptr;
    }
    FR_INLINE void fetch(int64_t k) const {
      const int64_t *of_y = problem->y_stride, *of_residual = problem->residual_stride;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          __builtin_prefetch(y + i * of_y[1] + j * of_y[2] + k, 1);
          if (residual) __builtin_prefetch(residual + i * of_residual[1] + j * of_residual[2] + k);
        }
      }
    }
  };

  template <class S>
  static void transform_output(const ConvProblem& problem, const Outputs& at, const Outputs& next, bool fetch,
                               const float* m, int64_t m_position, int64_t k_begin, int64_t k_end) {
    const Bounds bounds(problem.activation);
    for (int64_t k = k_begin; k < k_end; k += kLanes, m += kLanes) {
      const V scale = load<kLanes>(problem.scale + k), shift = load<kLanes>(problem.shift + k);
      const Element* residual = at.residual + (S::kResidual == Residual::kSome ? k : 0);
      if (fetch) next.fetch(k);
      if (k + kLanes <= k_end) {
        finish_channels<S, Lanes::kAll>(problem, m, m_position, scale, shift, bounds, residual, at.y + k,
                                        at.rows, at.columns, kLanes);
      } else {
        finish_channels<S, Lanes::kFewer>(problem, m, m_position, scale, shift, bounds, residual, at.y + k,
                                          at.rows, at.columns, k_end - k);
      }
    }
  }

  // V of a block of tiles; room: for as many floats as a pixel has channels.
  static void transform_inputs(const ConvProblem& problem, int64_t first_tile, int64_t tiles, float* room,
                               float* v) {
    std::fill_n(room, chunks_of(problem.shape.c) * kChunk, 0.0f);
    const auto* zeros = reinterpret_cast<const Element*>(room);
    const int64_t v_position = v_stride(problem.shape.c, tiles);
    const bool fetch = fetches(problem.shape);
    for_pixels(problem, first_tile, first_tile + tiles, zeros, [&](int64_t tile, auto& pixels, auto& next) {
      transform_input(problem.shape, pixels, next, fetch, zeros, v + (tile - first_tile) * kChunk, v_position,
                      tiles * kChunk);
    });
  }

  // The outputs of a block of tiles and panels [first, last) from M, which holds those panels.
  static void transform_outputs(const ConvProblem& problem, int64_t first_tile, int64_t tiles, const float* m,
                                int64_t m_position, int64_t first_panel, int64_t last_panel) {
    const int64_t k_begin = first_panel * kPanel, k_end = std::min(last_panel * kPanel, problem.shape.k);
    const int64_t m_tile = (last_panel - first_panel) * kPanel, last_tile = tiles_of(problem.shape) - 1;
    const bool fetch = fetches(problem.shape);
    with_steps(problem.activation, problem.residual != nullptr, [&](auto steps) {
      Outputs at(problem, first_tile);
      for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile, m += m_tile) {
        const Outputs next(problem, std::min(tile + 1, last_tile));
        transform_output<decltype(steps)>(problem, at, next, fetch, m, m_position, k_begin, k_end);
        at = next;
      }
    });
  }

  static int64_t tiles_of(const ConvShape& shape) {
    return shape.n * ceil_div(shape.p, kM) * ceil_div(shape.q, kM);
  }

  static ConvPlan plan(const ConvShape& shape, int threads) {
    const int64_t cache = level2_cache_bytes() / int64_t(sizeof(float)),
                  padded_c = chunks_of(shape.c) * kChunk;
    const int64_t panels = ceil_div(shape.k, kPanel);
    // V and M of a block take a quarter of the cache: weights pass through the rest. Weights from beyond it
    // are worth two groups of tiles.
    const bool weights_stay = weight_floats(shape) <= cache;
    const int64_t fitting = cache / 4 / (kPositions * (padded_c + panels * kPanel));
    const int64_t best = std::max<int64_t>(fitting, (weights_stay ? 1 : 2) * Block::kRows);
    ConvPlan plan = cut(tiles_of(shape), best, panels, threads, weights_stay);
    plan.scratch_floats = padded_c + kPositions * (v_stride(shape.c, plan.rows_per_block) +
                                                   m_stride(plan.panels_per_block, plan.rows_per_block));
    return plan;
  }

  static void run_piece(const ConvProblem& problem, const ConvPlan& plan, int64_t piece, float* scratch) {
    const int64_t first_tile = piece / plan.k_blocks * plan.rows_per_block;
    const int64_t tiles = std::min(plan.rows_per_block, plan.rows - first_tile);
    const int64_t first_panel = piece % plan.k_blocks * plan.panels_per_block;
    const int64_t panels = std::min(plan.panels_per_block, plan.panels - first_panel);
    const int64_t c = problem.shape.c, chunks = chunks_of(c), u_panel = chunks * kChunk * kPanel;
    const int64_t v_position = v_stride(c, tiles), m_position = m_stride(panels, tiles),
                  m_tile = panels * kPanel;
    float* zeros = scratch;
    float* v = zeros + chunks * kChunk;
    float* m = v + kPositions * v_stride(c, plan.rows_per_block);

    transform_inputs(problem, first_tile, tiles, zeros, v);
    for (int position = 0; position < kPositions; ++position) {
      const float* u = problem.weights + (position * plan.panels + first_panel) * u_panel;
      const float* next_position = u + plan.panels * u_panel;
      for (int64_t panel = 0; panel < panels; ++panel, u += u_panel) {
        const float* next = panel + 1 < panels ? u + u_panel : next_position;
        for_groups<Block, StoreProducts>(
            tiles, [&](auto kernel, int64_t first, int64_t group, int64_t groups) {
              kernel(v + position * v_position + first * kChunk, tiles * kChunk, chunks, u,
                     fetch_panel<Block>(next, chunks, group, groups),
                     m + position * m_position + first * m_tile + panel * kPanel, m_tile, false);
            });
      }
    }
    transform_outputs(problem, first_tile, tiles, m, m_position, first_panel, first_panel + panels);
  }

  static constexpr ConvKernel kernel() { return {kPanel, &weight_floats, &pack_weights, &plan, &run_piece}; }
};

}  // namespace fused_resnet::cpu
