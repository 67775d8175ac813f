// F(m x m, 3 x 3) on matrix tiles: float32 products from bfloat16 ones (bf16x3.h), the transforms and the cut
// into blocks of Winograd tiles as in winograd_kernel.h. In the order in which they are read:
//
//   U [position][panel][C / 32][part][2][16][16][2]   transformed weights as B tiles
//   V [position][C / 32][part][row][32]               transformed input of the block
//   M [position][row][K]                              products
//
// A row is a Winograd tile. A group is at most 32 rows: with a panel of 32 output channels four accumulators,
// the most that leaves room for two tiles of each operand. All groups of a block have the same number of
// rows, rounded up, and lie close together: what a matrix tile has beyond its own rows are the next group's,
// and its products of them are overwritten by that group.
#pragma once

#include <algorithm>

#include "bf16x3.h"
#include "tiles.h"
#include "winograd_kernel.h"

namespace fused_resnet::cpu {

// Two vectors, interleaved: (low[0], high[0], low[1], high[1], ...) in each part. What a part has
// no room for is cut off, not rounded: the sum of the parts is exact as well, and it takes half the
// instructions. What the products left out amount to is then up to 2^-22 of a product, not 2^-25: less than
// the transforms round.
template <int kLanes>
FR_INLINE void store_bf16x3_pairs(Vec<kLanes> low, Vec<kLanes> high, BFloat16* to, int64_t part_stride) {
  using U32 = typename IntVecTypes<kLanes>::U32;
  unroll<kParts>([&](auto part) FR_LAMBDA {
    const U32 top = (U32)high & 0xffff0000u;
    const U32 both = top | ((U32)low >> 16);
    std::memcpy(to + part * part_stride, &both, sizeof(both));
    if constexpr (decltype(part)::value < kParts - 1) {
      high -= (Vec<kLanes>)top;
      low -= (Vec<kLanes>)((U32)low & 0xffff0000u);
    }
  });
}

template <class Tiles, int kLanes, class W>
struct Bf16x3Winograd {
  static constexpr int64_t kPanel = 2 * kTileCols;  // output channels
  static constexpr int64_t kGroup = 2 * kTileRows;  // rows
  static constexpr int64_t kTileValues = kTileRows * kTileDepth;
  static constexpr int64_t kStepValues = kParts * 2 * kTileValues;  // of U, for 32 channels
  static constexpr int64_t kProductsOfStep = sizeof(kProducts) / sizeof(kProducts[0]);
  static constexpr int64_t kStepsAhead = 2;  // what is fetched is used so much later
  static constexpr int64_t kSkew = 32;       // values: keeps positions out of one another's cache sets
  static constexpr int kTile = W::kTile, kPositions = W::kPositions;
  using Block = RegisterBlock<kLanes, 1, kPanel / kLanes>;
  using Transforms = WinogradImpl<Block, W>;
  using V = Vec<kLanes>;

  static int64_t chunks_of(const ConvShape& shape) { return ceil_div(shape.c, kTileDepth); }
  static int64_t panel_values(const ConvShape& shape) { return chunks_of(shape) * kStepValues; }
  static int64_t weight_floats(const ConvShape& shape) {
    return kPositions * ceil_div(shape.k, kPanel) * panel_values(shape) / 2;
  }

  // U = G g G^T in float32, then in parts. Channels i and 16 + i of a chunk are a pair, since
  // store_bf16x3_pairs makes pairs of them in V.
  static void pack_weights(const ConvShape& shape, const float* weight, const int64_t stride[4],
                           int64_t first_panel, int64_t last_panel, float* packed) {
    const int64_t u_position = ceil_div(shape.k, kPanel) * panel_values(shape);
    BFloat16* out = reinterpret_cast<BFloat16*>(packed) + first_panel * panel_values(shape);
    constexpr int64_t kChannels = kTileDepth * kPanel;
    alignas(64) float u[kPositions * kChannels];
    for (int64_t panel = first_panel; panel < last_panel; ++panel, out += panel_values(shape)) {
      for (int64_t chunk = 0; chunk < chunks_of(shape); ++chunk) {
        const float* from = weight + panel * kPanel * stride[0] + chunk * kTileDepth * stride[1];
        FilterTransform<Block, W>::pack_panel(
            from, stride, std::min<int64_t>(shape.k - panel * kPanel, kPanel),
            std::min<int64_t>(shape.c - chunk * kTileDepth, kTileDepth), kTileDepth, kPanel, u, kChannels);
        for (int64_t position = 0; position < kPositions; ++position) {
          BFloat16* to = out + position * u_position + chunk * kStepValues;
          for (int64_t pair = 0; pair < kTileRows; ++pair) {
            const float* row = u + position * kChannels + pair * kPanel;
            for (int64_t k = 0; k < kPanel; k += kLanes) {
              store_bf16x3_pairs<kLanes>(
                  load<kLanes>(row + k), load<kLanes>(row + kTileRows * kPanel + k),
                  to + k / kTileCols * kTileValues + pair * kTileDepth + k % kTileCols * 2, 2 * kTileValues);
            }
          }
        }
      }
    }
  }

  // How a block of tiles lies in scratch memory; sizes in values (V) and floats (M).
  struct Layout {
    int64_t chunks, groups, group_rows, half_rows, part, v_position, m_row, m_position;
    Layout(const ConvShape& shape, int64_t tiles, int64_t panels)
        : chunks(chunks_of(shape)),
          groups(ceil_div(tiles, kGroup)),
          group_rows(ceil_div(tiles, groups)),
          half_rows(group_rows > kTileRows ? ceil_div(group_rows, 2) : 0) {
      const int64_t rows = (groups - 1) * group_rows + half_rows + kTileRows;
      part = rows * kTileDepth;
      v_position = chunks * kParts * part + kSkew;
      m_row = panels * kPanel;
      m_position = rows * m_row + kSkew / 2;
    }
    int64_t floats() const { return kPositions * (v_position / 2 + m_position); }
  };

  // V = B^T d B of one tile, in parts.
  static void transform_input(const ConvShape& shape, const float* const (&pixels)[kTile][kTile],
                              const float* const (&next)[kTile][kTile], bool fetch, const Layout& layout,
                              BFloat16* v) {
    constexpr int kVectors = kTileDepth / kLanes, kPairs = kVectors / 2;
    for (int64_t c = 0; c < shape.c; c += kTileDepth, v += kParts * layout.part) {
      V half[kTile][kTile][kVectors];  // B^T d
      const int64_t count = shape.c - c;
      if (fetch) {
        unroll<kVectors>([&](auto vector) { Transforms::fetch_pixels(next, c + vector * kLanes); });
      }
      for (int j = 0; j < kTile; ++j) {
        unroll<kVectors>([&](auto vector) FR_LAMBDA {
          const int64_t at = c + vector * kLanes, rest = count - vector * kLanes;
          input_transform<W, V>(
              [&](auto i) FR_LAMBDA {
                if (count >= kTileDepth) return load<kLanes>(pixels[i][j] + at);
                return rest <= 0 ? V{}
                                 : load_partial<kLanes>(pixels[i][j] + at, std::min<int64_t>(rest, kLanes));
              },
              [&](auto i, V value) FR_LAMBDA { half[i][j][vector] = value; });
        });
      }
      for (int i = 0; i < kTile; ++i) {
        BFloat16* to = v + i * kTile * layout.v_position;
        unroll<kPairs>([&](auto vector) FR_LAMBDA {
          constexpr int kVector = decltype(vector)::value;
          V low[kTile], high[kTile];
          input_transform<W, V>([&](auto j) FR_LAMBDA { return half[i][j][kVector]; },
                                [&](auto j, V value) FR_LAMBDA { low[j] = value; });
          input_transform<W, V>([&](auto j) FR_LAMBDA { return half[i][j][kVector + kPairs]; },
                                [&](auto j, V value) FR_LAMBDA { high[j] = value; });
          unroll<kTile>([&](auto j) FR_LAMBDA {
            store_bf16x3_pairs<kLanes>(low[j], high[j], to + j * layout.v_position + kVector * 2 * kLanes,
                                       layout.part);
          });
        });
      }
    }
  }

  // Weights that will be read next, `step` values of them for each 32 channels. Fetched evenly while products
  // are made they cost nothing, even from the third-level cache; in bursts, loads wait behind them.
  struct Ahead {
    const BFloat16* next;
    int64_t step;
  };

  // M = V U for one position of a group and a panel; kHalves: matrix tiles of 16 rows, half_rows apart.
  template <int kHalves>
  static void multiply(Tiles& tiles, const Layout& layout, const BFloat16* v, const BFloat16* u, Ahead ahead,
                       float* m) {
    constexpr int kProductsOfPart = kHalves * 2;
    const int64_t part = layout.part, half = layout.half_rows;
    unroll<kHalves * 2>([&](auto i) FR_LAMBDA { tiles.template zero<decltype(i)::value>(); });
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk, v += kParts * part, u += kStepValues) {
      const BFloat16* const end = ahead.next + ahead.step;
      unroll<kProductsOfStep>([&](auto i) FR_LAMBDA {
        constexpr int kIndex = decltype(i)::value, kBefore = kIndex > 0 ? kIndex - 1 : 0;
        constexpr int kXPart = kProducts[kIndex].x, kWPart = kProducts[kIndex].w;
        if constexpr (kIndex == 0 || kXPart != kProducts[kBefore].x) {
          unroll<kHalves>([&](auto row) FR_LAMBDA {
            tiles.template load<4 + decltype(row)::value>(v + kXPart * part + row * half * kTileDepth, 64);
          });
        }
        if constexpr (kIndex == 0 || kWPart != kProducts[kBefore].w) {
          unroll<2>([&](auto col) FR_LAMBDA {
            tiles.template load<6 + decltype(col)::value>(u + (kWPart * 2 + col) * kTileValues, 64);
          });
        }
        unroll<kProductsOfPart>([&](auto at) FR_LAMBDA {
          constexpr int kSum = decltype(at)::value;
          tiles.template multiply<kSum, 4 + kSum / 2, 6 + kSum % 2>();
          // A quarter of a matrix tile of V for the next 32 channels or, after the last, the next position.
          constexpr int kQuarter = kIndex * kProductsOfPart + kSum, kNextTile = kQuarter / 4;
          const BFloat16* next = v + (kParts + kNextTile / kHalves) * part +
                                 (kNextTile % kHalves * half + kQuarter % 4 * 4) * kTileDepth;
          unroll<4>([&](auto line) FR_LAMBDA { __builtin_prefetch(next + line * kTileDepth); });
          for (int line = 0; line < 8 / kHalves && ahead.next < end; ++line, ahead.next += kTileDepth) {
            __builtin_prefetch(ahead.next);
          }
        });
      });
    }
    unroll<kHalves * 2>([&](auto i) FR_LAMBDA {
      constexpr int kSum = decltype(i)::value;
      tiles.template store<kSum>(m + kSum / 2 * half * layout.m_row + kSum % 2 * kTileCols,
                                 layout.m_row * sizeof(float));
    });
  }

  // Weights and a block of 32 rows or a few more share the second-level cache. Weights that do not fit there
  // are better left in float32: with blocks large enough for such weights to hardly count, V and M leave the
  // cache, which was up to a third faster in a loop but slower where other data comes in between.
  static ConvPlan plan(const ConvShape& shape, int threads) {
    const int64_t cache = level2_cache_bytes(), panels = ceil_div(shape.k, kPanel);
    const int64_t group = Layout(shape, kGroup, panels).floats() * int64_t(sizeof(float));
    const int64_t most = std::max<int64_t>(1, cache / 3 / group) * kGroup,
                  tiles = Transforms::tiles_of(shape);
    // A row too many would make a second group of it: blocks are never larger.
    ConvPlan plan = cut(tiles, ceil_div(tiles, ceil_div(tiles, most)), panels, threads,
                        weight_floats(shape) * int64_t(sizeof(float)) <= cache / 2);
    plan.scratch_floats =
        chunks_of(shape) * kTileDepth + Layout(shape, plan.rows_per_block, plan.panels_per_block).floats();
    return plan;
  }

  static void run_piece(const ConvProblem& problem, const ConvPlan& plan, int64_t piece, float* scratch) {
    const ConvShape& shape = problem.shape;
    const int64_t first_tile = piece / plan.k_blocks * plan.rows_per_block;
    const int64_t count = std::min(plan.rows_per_block, plan.rows - first_tile);
    const int64_t first_panel = piece % plan.k_blocks * plan.panels_per_block;
    const int64_t panels = std::min(plan.panels_per_block, plan.panels - first_panel);
    const Layout layout(shape, count, panels);
    float* zeros = scratch;
    float* m = zeros + layout.chunks * kTileDepth;
    BFloat16* v = reinterpret_cast<BFloat16*>(m + kPositions * layout.m_position);

    std::fill_n(zeros, layout.chunks * kTileDepth, 0.0f);
    const bool fetch = Transforms::fetches(shape);
    Transforms::for_pixels(
        problem, first_tile, first_tile + count, zeros, [&](int64_t tile, auto& pixels, auto& next) {
          transform_input(shape, pixels, next, fetch, layout, v + (tile - first_tile) * kTileDepth);
        });
    Tiles tiles;
    const int64_t u_panel = panel_values(shape), u_position = plan.panels * u_panel;
    const BFloat16* weights = reinterpret_cast<const BFloat16*>(problem.weights) + first_panel * u_panel;
    const int64_t ahead = ceil_div(kStepValues / kTileDepth, layout.groups) * kTileDepth;
    for (int position = 0; position < kPositions; ++position) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const BFloat16* u = weights + position * u_position + panel * u_panel;
        const BFloat16* soon = u + kStepsAhead * kStepValues;
        for (int64_t group = 0; group < layout.groups; ++group) {
          const int64_t row = group * layout.group_rows;
          (layout.half_rows
               ? multiply<2>
               : multiply<1>)(tiles, layout, v + position * layout.v_position + row * kTileDepth, u,
                              Ahead{soon + group * layout.chunks * ahead, ahead},
                              m + position * layout.m_position + row * layout.m_row + panel * kPanel);
        }
      }
    }
    Transforms::transform_outputs(problem, first_tile, count, m, layout.m_position, first_panel,
                                  first_panel + panels);
  }

  static constexpr ConvKernel kernel() { return {kPanel, &weight_floats, &pack_weights, &plan, &run_piece}; }
};

}  // namespace fused_resnet::cpu
