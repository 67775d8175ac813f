// Direct convolution on matrix tiles: float32 products from bfloat16 ones (bf16x3.h), any filter, stride and
// dilation, as a GEMM over blocks of positions (bf16x3_geometry.h) with inputs (bf16x3_inputs.h) and weights
// (bf16x3_weights.h) in three parts.
//
// A group is 32 positions: with a panel of 32 output channels four accumulators, the most that leaves room
// for two tiles of each operand. Meanwhile the vector unit is free. It finishes the group before (scale,
// shift, residual, activation) and converts what is needed next, a little after each step.
//
// Weights that stay in the second-level cache are read again for each group, all panels of a group one after
// another, so that outputs and residual are read and written side by side. Others are read once, a slab of
// steps at a time by all groups of a block: of all panels, so that the slab's part of the input stays in the
// cache, or, where they are fresh (in float32, two thirds of the bytes), of one panel after another, since
// their slabs are small. Few positions have an order of their own.
#pragma once

#include <algorithm>
#include <utility>

#include "bf16x3_inputs.h"
#include "bf16x3_pending.h"
#include "bf16x3_weights.h"
#include "direct_kernel.h"
#include "memory.h"

namespace fused_resnet::cpu {

template <class Tiles, int kLanes, bool kFresh>
struct Bf16x3Direct {
  using Weights = Bf16x3Weights<kLanes>;
  using Inputs = Bf16x3Inputs<kLanes>;
  using Pending = Bf16x3Pending<kLanes>;
  static constexpr int64_t kGroup = 2 * kTileRows;  // positions
  static constexpr int64_t kPanel = Weights::kPanel, kTileValues = Weights::kTileValues;
  static constexpr int64_t kStepValues = Weights::kStepValues;
  static constexpr int64_t kProductsOfStep = sizeof(kProducts) / sizeof(kProducts[0]);
  static constexpr int64_t kSlab = kFresh ? 8 : 36;  // steps: sums between two slabs wait in memory

  static int64_t panel_floats(const ConvShape& shape) {
    return Weights::steps_of(shape) * (kFresh ? Weights::kStepWeights : kStepValues / 2);
  }
  static int64_t weight_floats(const ConvShape& shape) {
    return ceil_div(shape.k, kPanel) * panel_floats(shape);
  }
  static void pack_weights(const ConvShape& shape, const float* weight, const int64_t stride[4],
                           int64_t first_panel, int64_t last_panel, float* packed) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      Weights::pack_panel(shape, weight + panel * kPanel * stride[0], stride,
                          std::min<int64_t>(shape.k - panel * kPanel, kPanel), kFresh,
                          packed + panel * panel_floats(shape));
    }
  }

  // One group and one panel: sums = (or +=) X U. between() is called after each product of parts, after(step)
  // after each step.
  template <class Between, class After>
  static FR_INLINE void multiply(Tiles& tiles, const BFloat16* x, int64_t part_stride, const int64_t* offsets,
                                 int64_t steps, const BFloat16* u, float* sums, int64_t sums_stride, bool add,
                                 Between&& between, After&& after) {
    const int64_t row_bytes = sums_stride * int64_t(sizeof(float));
    unroll<4>([&](auto i) FR_LAMBDA {
      constexpr int kSum = decltype(i)::value;
      if (add) {
        tiles.template load<kSum>(sums + kSum / 2 * kTileRows * sums_stride + kSum % 2 * kTileCols,
                                  row_bytes);
      } else {
        tiles.template zero<kSum>();
      }
    });
    for (int64_t step = 0; step < steps; ++step, u += kStepValues) {
      const BFloat16* v = x + offsets[step];
      unroll<kProductsOfStep>([&](auto i) FR_LAMBDA {
        constexpr int kIndex = decltype(i)::value, kBefore = kIndex > 0 ? kIndex - 1 : 0;
        constexpr int kXPart = kProducts[kIndex].x, kWPart = kProducts[kIndex].w;
        if constexpr (kIndex == 0 || kXPart != kProducts[kBefore].x) {
          unroll<2>([&](auto row) FR_LAMBDA {
            tiles.template load<4 + decltype(row)::value>(v + kXPart * part_stride + row * kTileValues, 64);
          });
        }
        if constexpr (kIndex == 0 || kWPart != kProducts[kBefore].w) {
          unroll<2>([&](auto col) FR_LAMBDA {
            tiles.template load<6 + decltype(col)::value>(u + (kWPart * 2 + col) * kTileValues, 64);
          });
        }
        unroll<4>([&](auto at) FR_LAMBDA {
          constexpr int kSum = decltype(at)::value;
          tiles.template multiply<kSum, 4 + kSum / 2, 6 + kSum % 2>();
          // A quarter of each tile that the next step will need, from the second-level cache: few loads of
          // tiles can be on their way at once.
          constexpr int kTile = kIndex, kLine = kSum * kTileRows / 4;
          const BFloat16* next_v = x + offsets[step + 1] + kTile / 2 * part_stride + kTile % 2 * kTileValues;
          const BFloat16* next_u = u + kStepValues + kTile * kTileValues;
          unroll<4>([&](auto line) FR_LAMBDA {
            __builtin_prefetch(next_v + (kLine + line) * kTileDepth);
            __builtin_prefetch(next_u + (kLine + line) * kTileDepth);
          });
        });
        between();
      });
      after(step);
    }
    unroll<4>([&](auto i) FR_LAMBDA {
      constexpr int kSum = decltype(i)::value;
      tiles.template store<kSum>(sums + kSum / 2 * kTileRows * sums_stride + kSum % 2 * kTileCols, row_bytes);
    });
  }

  static bool weights_stay(const ConvShape& shape) {
    return !kFresh && weight_floats(shape) * int64_t(sizeof(float)) <= level2_cache_bytes() / 2;
  }

  static int64_t slabs_of(const ConvShape& shape) { return ceil_div(Weights::steps_of(shape), kSlab); }
  static bool sums_wait(const ConvShape& shape) {
    return !kFresh && !weights_stay(shape) && slabs_of(shape) > 1;
  }

  static ConvPlan plan(const ConvShape& shape, int threads) {
    const Bf16x3Geometry geometry(shape);
    const int64_t cache = level2_cache_bytes();
    const bool stay = weights_stay(shape);
    const int64_t x_bytes = geometry.phases() * Weights::chunks_of(shape) * kParts * 64 * kGroup;
    const int64_t panels = ceil_div(shape.k, kPanel), sums = kGroup * kPanel * int64_t(sizeof(float));
    // All panels use a slab's part of the input before the next slab, and their sums wait.
    const int64_t in_use = sums_wait(shape) ? x_bytes / slabs_of(shape) + panels * sums : x_bytes;
    const int64_t best = std::max<int64_t>(1, cache / (stay ? 4 : 2) / in_use);
    ConvPlan plan = cut(ceil_div(geometry.positions(), kGroup), best, panels, threads, stay);
    plan.scratch_floats = Scratch(shape, plan).floats;
    return plan;
  }

  // Where a block's arrays begin, in floats.
  struct Scratch {
    int64_t sums, outputs, steps, slabs, floats;
    Scratch(const ConvShape& shape, const ConvPlan& plan) {
      const Bf16x3Geometry geometry(shape);
      const int64_t positions = plan.rows_per_block * kGroup;
      // Of one group those of two panels, since those of one wait to be finished.
      const int64_t waiting = weights_stay(shape) ? 2 * plan.panels_per_block
                              : sums_wait(shape)  ? plan.rows_per_block * plan.panels_per_block
                                                  : plan.rows_per_block;
      sums = Bf16x3Layout(shape, geometry, positions).values / 2;
      outputs = sums + std::max<int64_t>(waiting, 2) * kGroup * kPanel;
      steps = outputs + 2 * positions;
      slabs = ceil_div(steps + 2 * (Weights::steps_of(shape) + 1), kCacheLine) * kCacheLine;
      floats = slabs + (kFresh ? kSlab * kStepValues : 0);  // two of them, in bfloat16
    }
  };

  // What a block of positions and panels needs.
  struct Piece {
    const ConvProblem& problem;
    const ConvShape& shape;
    const Bf16x3Geometry geometry;
    int64_t first, groups, first_panel, last_panel;
    const Bf16x3Layout layout;
    BFloat16 *x, *slabs;
    float* sums;
    int64_t *outputs, *offsets;
    const int64_t steps;

    Piece(const ConvProblem& p, const ConvPlan& plan, int64_t piece, float* scratch)
        : problem(p),
          shape(p.shape),
          geometry(p.shape),
          first(piece / plan.k_blocks * plan.rows_per_block * kGroup),
          groups(std::min(plan.rows_per_block, plan.rows - first / kGroup)),
          first_panel(piece % plan.k_blocks * plan.panels_per_block),
          last_panel(std::min(first_panel + plan.panels_per_block, plan.panels)),
          layout(p.shape, geometry, plan.rows_per_block * kGroup),
          steps(Weights::steps_of(p.shape)) {
      const Scratch at(shape, plan);
      x = reinterpret_cast<BFloat16*>(scratch);
      slabs = reinterpret_cast<BFloat16*>(scratch + at.slabs);
      sums = scratch + at.sums;
      outputs = reinterpret_cast<int64_t*>(scratch + at.outputs);
      offsets = reinterpret_cast<int64_t*>(scratch + at.steps);
      layout.find_steps(shape, geometry, offsets);
      offsets[steps] = 0;  // what follows the last step is the first of the next group or panel
      Position position(geometry, first);
      for (int64_t i = 0; i < groups * kGroup; ++i, position.step()) {
        outputs[i] = position.is_output()
                         ? ((position.n * shape.p + position.i) * shape.q + position.j) * shape.k
                         : -1;
      }
    }
    int64_t positions() const { return groups * kGroup + geometry.largest_shift(); }
    const BFloat16* inputs_of(int64_t group) const { return x + group * kGroup * kTileDepth; }
    Pending pending(const float* of_sums, int64_t stride, int64_t group, int64_t k_begin,
                    int64_t k_end) const {
      return {&problem, Bounds(problem.activation), of_sums, stride, outputs + group * kGroup,
              k_begin,  std::min(k_end, shape.k)};
    }
  };

  // Weights that stay: group by group.
  static void run_groups(Tiles& tiles, const Piece& piece) {
    const int64_t panels = piece.last_panel - piece.first_panel, sums_stride = panels * kPanel;
    const BFloat16* weights = reinterpret_cast<const BFloat16*>(piece.problem.weights);
    Inputs inputs(piece.problem, piece.geometry, piece.layout, piece.first, piece.positions(), piece.x);
    inputs.advance(kGroup + piece.geometry.largest_shift());
    Pending before = piece.pending(nullptr, sums_stride, 0, 0, 0);
    for (int64_t group = 0; group < piece.groups; ++group) {
      float* sums = piece.sums + group % 2 * kGroup * sums_stride;
      int64_t step_of_group = 0, done = 0;
      for (int64_t panel = 0; panel < panels; ++panel) {
        multiply(
            tiles, piece.inputs_of(group), piece.layout.part, piece.offsets, piece.steps,
            weights + (piece.first_panel + panel) * piece.steps * kStepValues, sums + panel * kPanel,
            sums_stride, false, []() FR_LAMBDA {},
            [&](int64_t) FR_LAMBDA {
              const int64_t end = ++step_of_group * kGroup / (panels * piece.steps);
              if (end == done) return;
              before.finish(done, end);
              inputs.advance(end - done);  // of the next group
              done = end;
            });
      }
      before = piece.pending(sums, sums_stride, group, piece.first_panel * kPanel, piece.last_panel * kPanel);
    }
    before.finish(0, kGroup);
  }

  // Weights that are read once: slab by slab.
  static void run_slabs(Tiles& tiles, const Piece& piece) {
    Inputs(piece.problem, piece.geometry, piece.layout, piece.first, piece.positions(), piece.x)
        .advance(piece.positions());
    const int64_t steps = piece.steps, groups = piece.groups, panels = piece.last_panel - piece.first_panel;
    const int64_t slabs = slabs_of(piece.shape), parts = slabs * panels;
    const bool all_panels = sums_wait(piece.shape);
    // The slab of a panel that is the i-th to be used.
    struct Part {
      int64_t panel, begin, end;
    };
    const auto part_at = [&](int64_t i) {
      const int64_t slab = all_panels ? i / panels : i % slabs;
      return Part{piece.first_panel + (all_panels ? i % panels : i / slabs), steps * slab / slabs,
                  steps * (slab + 1) / slabs};
    };
    const auto stored = [&](const Part& part) {
      return reinterpret_cast<const BFloat16*>(piece.problem.weights) +
             (part.panel * steps + part.begin) * kStepValues;
    };
    BFloat16 *slab = piece.slabs, *other = slab + kSlab * kStepValues;
    // What makes the weights of a part ready, and how much there is to do.
    const auto ready = [&](const Part& part, BFloat16* to) {
      const int64_t count = part.end - part.begin;
      if constexpr (kFresh) {
        const float* w = piece.problem.weights + part.panel * steps * Weights::kStepWeights;
        return std::pair(typename Weights::Converter{w + part.begin * kTileValues, steps * kTileValues, to, 0,
                                                     count * Weights::kUnits},
                         count * Weights::kUnits);
      } else {
        return std::pair(typename Weights::Fetcher{stored(part)}, count * kStepValues / kTileDepth);
      }
    };

    if constexpr (kFresh) {
      auto [first, work] = ready(part_at(0), slab);
      first.advance(work);
    }
    Pending before = piece.pending(nullptr, kPanel, 0, 0, 0);
    for (int64_t i = 0; i < parts; ++i) {
      const Part part = part_at(i);
      const int64_t count = part.end - part.begin;
      auto [following, work] = ready(part_at(std::min(i + 1, parts - 1)), other);
      auto& next = following;  // C++17 lets no lambda capture a structured binding
      const int64_t share = i + 1 < parts ? ceil_div(work, groups * count * kProductsOfStep) : 0;
      const BFloat16* weights = kFresh ? slab : stored(part);
      for (int64_t group = 0; group < groups; ++group) {
        // One group alone would begin the next panel's sums while this panel's wait to be finished.
        const int64_t place = all_panels   ? (part.panel - piece.first_panel) * groups + group
                              : groups > 1 ? group
                                           : part.panel % 2;
        float* sums = piece.sums + place * kGroup * kPanel;
        Pending now = piece.pending(sums, kPanel, group, part.panel * kPanel, (part.panel + 1) * kPanel);
        if (part.end < steps) now.sums = nullptr;
        multiply(
            tiles, piece.inputs_of(group), piece.layout.part, piece.offsets + part.begin, count, weights,
            sums, kPanel, part.begin > 0, [&]() FR_LAMBDA { next.advance(share); },
            [&](int64_t step) FR_LAMBDA {
              const int64_t begin = step * kGroup / count, end = (step + 1) * kGroup / count;
              before.finish(begin, end);
              now.fetch(begin, end);
            });
        before = now;
      }
      std::swap(slab, other);
    }
    before.finish(0, kGroup);
  }

  // Fresh weights for so few positions that four tiles hold them all: sixteen outputs of all positions from
  // the first step to the last in four accumulators. So each weight is converted once, a step ahead, into a
  // buffer that stays in the first-level cache, and no sum waits in memory.
  static constexpr int64_t kFewTiles = 4, kFewPositions = kFewTiles * kTileRows;
  static constexpr int kFewProducts = kFewTiles * kProductsOfStep;
  static_assert(kFewTiles * kTileCols <= kGroup * kPanel / kTileRows, "the sums of two passes have room");

  static void run_few(Tiles& tiles, const Piece& piece) {
    Inputs(piece.problem, piece.geometry, piece.layout, piece.first, piece.positions(), piece.x)
        .advance(piece.positions());
    const int64_t steps = piece.steps, end = 2 * piece.last_panel;
    // A pass is half a panel.
    const auto weights_of = [&](int64_t pass) { return piece.problem.weights + pass * steps * kTileValues; };
    BFloat16 *u = piece.slabs, *other = u + kParts * kTileValues;
    Weights::convert_tile(weights_of(2 * piece.first_panel), 0, Weights::kTileUnits, u);
    Pending before = piece.pending(nullptr, kTileCols, 0, 0, 0);
    for (int64_t pass = 2 * piece.first_panel; pass < end; ++pass) {
      const float *w = weights_of(pass), *next_pass = pass + 1 < end ? weights_of(pass + 1) : w;
      const auto weights_at = [&](int64_t step) {
        return step < steps ? w + step * kTileValues : next_pass + (step - steps) % steps * kTileValues;
      };
      float* sums = piece.sums + pass % 2 * kFewPositions * kTileCols;
      const Pending now = piece.pending(sums, kTileCols, 0, pass * kTileCols, (pass + 1) * kTileCols);
      unroll<kFewTiles>([&](auto tile) FR_LAMBDA { tiles.template zero<decltype(tile)::value>(); });
      for (int64_t step = 0; step < steps; ++step) {
        constexpr int64_t kFar = 16;  // steps: further than the processor looks ahead by itself
        multiply_few(tiles, piece.x + piece.offsets[step], piece.layout.part, u, weights_at(step + 1), other,
                     weights_at(step + kFar));
        std::swap(u, other);
        const int64_t row = step * kFewPositions / steps, until = (step + 1) * kFewPositions / steps;
        before.finish(row, until);
        now.fetch(row, until);
      }
      unroll<kFewTiles>([&](auto tile) FR_LAMBDA {
        tiles.template store<decltype(tile)::value>(sums + tile * kTileRows * kTileCols,
                                                    kTileCols * sizeof(float));
      });
      before = now;
    }
    before.finish(0, kFewPositions);
  }

  // One step of all positions for sixteen outputs; meanwhile the next step's weights are converted to `to`,
  // and those of a later one fetched.
  static FR_INLINE void multiply_few(Tiles& tiles, const BFloat16* x, int64_t part_stride, const BFloat16* u,
                                     const float* next, BFloat16* to, const float* far) {
    unroll<kParts>([&](auto part) FR_LAMBDA {
      tiles.template load<4 + decltype(part)::value>(u + part * kTileValues, 64);
    });
    // Of x the smallest part first: x2 w0; x1 w1, x1 w0; x0 w2, x0 w1, x0 w0.
    unroll<kParts>([&](auto i) FR_LAMBDA {
      constexpr int kCount = decltype(i)::value + 1, kXPart = kParts - kCount;
      unroll<kFewTiles>([&](auto tile) FR_LAMBDA {
        constexpr int kSum = decltype(tile)::value;
        tiles.template load<7>(x + kXPart * part_stride + tile * kTileValues, 64);
        unroll<kCount>(
            [&](auto j) FR_LAMBDA { tiles.template multiply<kSum, 7, 3 + kCount - decltype(j)::value>(); });
        // The vector unit keeps pace with the products.
        constexpr int kDone = kCount * (kCount - 1) / 2 * kFewTiles + kCount * (kSum + 1);
        constexpr int64_t kFirst = Weights::kTileUnits * (kDone - kCount) / kFewProducts,
                          kLast = Weights::kTileUnits * kDone / kFewProducts;
        Weights::fetch_units(far + kFirst * Weights::kUnit, kLast - kFirst);
        Weights::convert_tile(next, kFirst, kLast, to);
      });
    });
  }

  static void run_piece(const ConvProblem& problem, const ConvPlan& plan, int64_t number, float* scratch) {
    const Piece piece(problem, plan, number, scratch);
    Tiles tiles;
    if (weights_stay(problem.shape)) return run_groups(tiles, piece);
    if constexpr (kFresh) {
      if (piece.groups * kGroup == kFewPositions) return run_few(tiles, piece);
    }
    run_slabs(tiles, piece);
  }

  static constexpr ConvKernel kernel() { return {kPanel, &weight_floats, &pack_weights, &plan, &run_piece}; }
};

}  // namespace fused_resnet::cpu
