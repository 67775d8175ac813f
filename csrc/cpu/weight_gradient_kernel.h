// The gradient of a 3 x 3 filter for one instruction set. Winograd's forward pass is, for each position of a
// tile, M = U V; its transpose with respect to the filter is
//
//   d_g = G^T [ sum over tiles of (A d_Y A^T) .* (B^T d B) ] G      d_Y: m x m, d: (m+2) x (m+2), d_g: 3 x 3
//
// one GEMM per position again, K x tiles times tiles x C: (m+2)^2 multiply-adds where direct computation
// takes 9 m^2, 2.25 times as many for m = 2.
//
//   V [position][C / kChunk][tile][kChunk]    transformed input of a step's tiles
//   Z [position][K / kChunk][tile][kChunk]    transformed gradient of the output
//   U [position][K][C]                        sums
#pragma once

#include <algorithm>
#include <numeric>

#include "weight_gradient.h"
#include "winograd_kernel.h"

namespace fused_resnet::cpu {

// out[j] = (A in)[j], the transpose of output_transform.
template <class W, class V, class Load, class Store>
FR_INLINE void output_gradient_transform(Load&& in, Store&& out) {
  out(std::integral_constant<int, 0>{}, V(in(std::integral_constant<int, 0>{})));
  unroll<(W::kTile - 2) / 2>([&](auto pair) FR_LAMBDA {
    constexpr int kPlus = 2 * decltype(pair)::value + 1;  // the points +p and -p
    V even = {}, odd = {};
    bool no_even = true, no_odd = true;
    unroll<W::kM>([&](auto i) FR_LAMBDA {
      constexpr float kPower = float(W::kOutput[decltype(i)::value][kPlus]);
      if constexpr (decltype(i)::value % 2 == 0) {
        accumulate(even, no_even, kPower, V(in(i)));
      } else {
        accumulate(odd, no_odd, kPower, V(in(i)));
      }
    });
    out(std::integral_constant<int, kPlus>{}, even + odd);
    out(std::integral_constant<int, kPlus + 1>{}, even - odd);
  });
  out(std::integral_constant<int, W::kTile - 1>{}, V(in(std::integral_constant<int, W::kM - 1>{})));
}

// out[r] = (G^T in)[r].
template <class W, class V, class Load, class Store>
FR_INLINE void filter_gradient_transform(Load&& in, Store&& out) {
  unroll<3>([&](auto r) FR_LAMBDA {
    V sum = {};
    bool first = true;
    unroll<W::kTile>([&](auto i) FR_LAMBDA {
      accumulate(sum, first, float(W::kFilter[decltype(i)::value][decltype(r)::value]), V(in(i)));
    });
    out(r, sum);
  });
}

// Block: kRows output channels, a divisor of kChunk, times kPanel input channels.
template <class Block, class W>
struct WeightGradientImpl {
  static constexpr int kLanes = Block::kLanes, kRows = Block::kRows, kCols = Block::kCols;
  static constexpr int kPanel = Block::kPanel, kM = W::kM, kTile = W::kTile, kPositions = W::kPositions;
  static constexpr int64_t kUnit = kPanel > kChunk ? kPanel : kChunk;  // channels are padded to multiples
  static constexpr int64_t kSkew = 16;  // keeps the positions out of one another's cache sets
  // So that the sums of all positions fit into half of a second-level cache of 1 to 2 MiB.
  static constexpr int64_t kMostChannels = kM == 2 ? 128 : 64;
  using V = Vec<kLanes>;
  using Forward = WinogradImpl<Block, W>;
  static_assert(kChunk % kRows == 0 && (kPanel % kChunk == 0 || kChunk % kPanel == 0),
                "blocks end with chunks");

  static int64_t padded(int64_t channels) { return ceil_div(channels, kUnit) * kUnit; }
  static int64_t transformed_stride(int64_t channels, int64_t tiles) {
    return padded(channels) * tiles + kSkew;
  }

  // Blocks of nearly equal width, at most kMostChannels, whole units.
  static int64_t block_of(int64_t channels) {
    return padded(ceil_div(channels, ceil_div(channels, kMostChannels)));
  }

  static WeightGradientPlan plan(const ConvShape& shape, int threads) {
    WeightGradientPlan plan;
    plan.tiles = shape.n * ceil_div(shape.p, kM) * ceil_div(shape.q, kM);
    plan.c_block = block_of(shape.c), plan.c_blocks = ceil_div(shape.c, plan.c_block);
    plan.k_block = block_of(shape.k), plan.k_blocks = ceil_div(shape.k, plan.k_block);
    // V and Z of a step and the sums share the second-level cache.
    const int64_t cache = level2_cache_bytes() / int64_t(sizeof(float)),
                  sums = kPositions * plan.k_block * plan.c_block;
    const int64_t room = std::max(cache * 3 / 4 - sums, cache / 4);
    const int64_t fitting = room / (kPositions * (plan.c_block + plan.k_block));
    // As many splits as make the pieces a multiple of the threads, but none so short that its sums would
    // outweigh it.
    const int64_t blocks = plan.c_blocks * plan.k_blocks, most = std::max<int64_t>(plan.tiles / 64, 1);
    plan.splits = std::min(threads / std::gcd<int64_t>(blocks, threads), most);
    plan.tiles_per_split = ceil_div(plan.tiles, plan.splits);
    plan.splits = ceil_div(plan.tiles, plan.tiles_per_split);
    // At least eight steps where there are the tiles for it: a sum of eight sums rounds less than one long
    // sum.
    const int64_t most_tiles = std::min<int64_t>(128, plan.tiles_per_split / 8);
    plan.tiles_per_step = std::max<int64_t>(std::min(fitting, most_tiles) / 16 * 16, 16);
    plan.scratch_floats = plan.c_block + plan.k_block + sums +
                          kPositions * (transformed_stride(plan.c_block, plan.tiles_per_step) +
                                        transformed_stride(plan.k_block, plan.tiles_per_step));
    return plan;
  }

  // Z = A d_Y A^T for `channels` output channels of one tile. Pixels outside the image are read from `zeros`.
  static void transform_gradient(const WeightGradientProblem& problem, int64_t tile, const float* grad_y,
                                 int64_t channels, const float* zeros, float* z, int64_t z_position,
                                 int64_t z_chunk) {
    const ConvShape& shape = problem.shape;
    const typename Forward::Place at(shape, tile);
    const float* first = grad_y + at.image * problem.grad_y_stride[0];
    const float* pixels[kM][kM];
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kM; ++j) {
        const int64_t p = at.top + i, q = at.left + j;
        const bool inside = p < shape.p && q < shape.q;
        pixels[i][j] = inside ? first + p * problem.grad_y_stride[1] + q * problem.grad_y_stride[2] : zeros;
      }
    }
    const int64_t whole = channels / kLanes * kLanes;
    for (int64_t k = 0; k < channels; k += kLanes) {
      float* out = z + k / kChunk * z_chunk + k % kChunk;
      if (k < whole) {
        transform_gradient_channels(out, z_position,
                                    [&](int i, int j) FR_LAMBDA { return load<kLanes>(pixels[i][j] + k); });
      } else {
        transform_gradient_channels(out, z_position, [&](int i, int j) FR_LAMBDA {
          return load_partial<kLanes>(pixels[i][j] + k, channels - k);
        });
      }
    }
  }

  template <class Pixel>
  static FR_INLINE void transform_gradient_channels(float* out, int64_t z_position, Pixel&& pixel) {
    V half[kTile][kM];  // A d_Y
    unroll<kM>([&](auto j) FR_LAMBDA {
      output_gradient_transform<W, V>([&](auto i) FR_LAMBDA { return pixel(i, j); },
                                      [&](auto i, V value) FR_LAMBDA { half[i][j] = value; });
    });
    unroll<kTile>([&](auto i) FR_LAMBDA {
      output_gradient_transform<W, V>(
          [&](auto j) FR_LAMBDA { return half[i][j]; },
          [&](auto j, V value) FR_LAMBDA { store<kLanes>(out + (i * kTile + j) * z_position, value); });
    });
  }

  // U[kRows][kPanel] (+)= Z^T V over the tiles of a step. Each step is summed by itself: sums of sums round
  // less.
  static void multiply_tiles(const float* z, const float* v, int64_t v_chunk, int64_t tiles, float* u,
                             int64_t u_row, bool first) {
    unroll<kRows>([&](auto row) FR_LAMBDA {
      for (int j = 0; j < kPanel; j += 16) __builtin_prefetch(u + row * u_row + j, 1);
    });
    V sum[kRows][kCols] = {};
    for (int64_t t = 0; t < tiles; ++t) {
      V input[kCols];
      unroll<kCols>([&](auto j) FR_LAMBDA {
        constexpr int kChannel = decltype(j)::value * kLanes;
        input[j] = load<kLanes>(v + kChannel / kChunk * v_chunk + kChannel % kChunk + t * kChunk);
      });
      unroll<kRows>([&](auto row) FR_LAMBDA {
        const float value = z[t * kChunk + row];
        unroll<kCols>([&](auto j) FR_LAMBDA { sum[row][j] += value * input[j]; });
      });
    }
    unroll<kRows>([&](auto row) FR_LAMBDA {
      unroll<kCols>([&](auto j) FR_LAMBDA {
        float* to = u + row * u_row + j * kLanes;
        store<kLanes>(to, first ? sum[row][j] : load<kLanes>(to) + sum[row][j]);
      });
    });
  }

  // d_g = G^T U G for the block's filters, into [K][3][3][C].
  static void transform_filters(const float* u, int64_t u_position, int64_t u_row, int64_t k_count,
                                int64_t c_count, int64_t c_all, float* d_weight) {
    for (int64_t k = 0; k < k_count; ++k, u += u_row, d_weight += 9 * c_all) {
      for (int64_t c = 0; c < c_count; c += kLanes) {
        V half[3][kTile];  // G^T U
        unroll<kTile>([&](auto j) FR_LAMBDA {
          filter_gradient_transform<W, V>(
              [&](auto i) FR_LAMBDA { return load<kLanes>(u + (i * kTile + j) * u_position + c); },
              [&](auto r, V value) FR_LAMBDA { half[r][j] = value; });
        });
        unroll<3>([&](auto r) FR_LAMBDA {
          filter_gradient_transform<W, V>([&](auto j) FR_LAMBDA { return half[r][j]; },
                                          [&](auto s, V value) FR_LAMBDA {
                                            float* to = d_weight + (r * 3 + s) * c_all + c;
                                            if (c + kLanes <= c_count) {
                                              store<kLanes>(to, value);
                                            } else {
                                              store_partial<kLanes>(to, value, c_count - c);
                                            }
                                          });
        });
      }
    }
  }

  static void run_piece(const WeightGradientProblem& problem, const WeightGradientPlan& plan, int64_t piece,
                        float* d_weight, float* scratch) {
    const int64_t c_begin = piece % plan.c_blocks * plan.c_block;
    const int64_t k_begin = piece / plan.c_blocks % plan.k_blocks * plan.k_block;
    const int64_t split = piece / plan.c_blocks / plan.k_blocks;
    const int64_t c_count = std::min(plan.c_block, problem.shape.c - c_begin);
    const int64_t k_count = std::min(plan.k_block, problem.shape.k - k_begin);
    const int64_t u_row = plan.c_block, u_position = plan.k_block * u_row;
    const int64_t v_position = transformed_stride(plan.c_block, plan.tiles_per_step);
    const int64_t z_position = transformed_stride(plan.k_block, plan.tiles_per_step);
    float* zeros = scratch;
    float* u = zeros + plan.c_block + plan.k_block;
    float* v = u + kPositions * u_position;
    float* z = v + kPositions * v_position;
    std::fill_n(zeros, plan.c_block + plan.k_block, 0.0f);
    // Channels that pad a block are multiplied like the others and their products never read.
    std::fill(v, z + kPositions * z_position, 0.0f);

    // The forward transform on the block's channels alone.
    ConvProblem forward{};
    forward.shape = problem.shape, forward.shape.c = c_count;
    forward.x = problem.x + c_begin;
    std::copy_n(problem.x_stride, 3, forward.x_stride);

    const int64_t begin = split * plan.tiles_per_split,
                  end = std::min(begin + plan.tiles_per_split, plan.tiles);
    for (int64_t tile = begin; tile < end; tile += plan.tiles_per_step) {
      const int64_t tiles = std::min(plan.tiles_per_step, end - tile), chunk = plan.tiles_per_step * kChunk;
      Forward::for_pixels(forward, tile, tile + tiles, zeros, [&](int64_t at, auto& pixels, auto& next) {
        const int64_t t = at - tile;
        Forward::transform_input(forward.shape, pixels, next, false, zeros, v + t * kChunk, v_position,
                                 chunk);
        transform_gradient(problem, at, problem.grad_y + k_begin, k_count, zeros, z + t * kChunk, z_position,
                           chunk);
      });
      for (int position = 0; position < kPositions; ++position) {
        for (int64_t c = 0; c < c_count; c += kPanel) {
          const float* inputs = v + position * v_position + c / kChunk * chunk + c % kChunk;
          for (int64_t k = 0; k < k_count; k += kRows) {
            multiply_tiles(z + position * z_position + k / kChunk * chunk + k % kChunk, inputs, chunk, tiles,
                           u + position * u_position + k * u_row + c, u_row, tile == begin);
          }
        }
      }
    }
    const int64_t c_all = problem.shape.c;
    transform_filters(u, u_position, u_row, k_count, c_count, c_all,
                      d_weight + (split * problem.shape.k + k_begin) * 9 * c_all + c_begin);
  }

  static constexpr WeightGradientKernel kernel() { return {&plan, &run_piece}; }
};

}  // namespace fused_resnet::cpu
