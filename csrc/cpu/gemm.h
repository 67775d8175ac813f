// The micro-kernel: M[t][k] = sum_c V[t][c] * U[c][k] for up to kRows rows and one panel of output channels,
// held in registers from the first channel to the last. A c is a word: a float32, or two bfloat16 channels
// (bf16_block.h), whose products are both added.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "conv.h"
#include "vec.h"

namespace fused_resnet::cpu {

// The register block. 14 x 32 takes 28 accumulators, 2 weights and 1 broadcast of 32 registers (AVX-512),
// 6 x 16 the same of 16 (AVX2): as many multiply-adds as possible for each load.
//
// Element: the type of the activations in memory. Not that of the products, which are float32's here.
template <int kLanes_, int kRows_, int kCols_, class Element_ = float>
struct RegisterBlock {
  using Element = Element_;
  static constexpr int kLanes = kLanes_;
  static constexpr int kRows = kRows_;           // pixels or tiles
  static constexpr int kCols = kCols_;           // vectors of output channels
  static constexpr int kPanel = kLanes * kCols;  // output channels

  // Chunks that are summed in one accumulator; longer sums are made of such partial sums. The rounding error
  // of one long sum grows with its length n, that of sums of b with about sqrt(n b): 3 to 5 times less at
  // 1,000 to 4,600 products, which oneDNN's kernels for small images reach as well.
  static constexpr int64_t kSegment = 6;

  static FR_INLINE void multiply_add(Vec<kLanes>& sum, float value, Vec<kLanes> weight) {
    sum += value * weight;
  }
};

// Words of a row that lie together. V is [C / kChunk][row][kChunk], so the distance between two rows is a
// constant: fourteen addresses are one register and fourteen displacements.
constexpr int kChunk = 16;

// `next` is what will be read after U: it is fetched while the multiply-adds go on, two cache lines for each
// channel, `step` floats further for each chunk. A hardware prefetcher stops at every page, and cannot know
// where the next weights lie.
struct Ahead {
  const float* next;
  int64_t step;
};
constexpr int kCacheLine = 16;  // floats

#if defined(__GNUC__) && !defined(__clang__)
  #pragma GCC diagnostic push  // GCC does not see that `total` is read only after it has been written
  #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
// sum[row][j] = the products of kRows rows with one panel; before_chunk(number of the chunk) may fetch more.
template <class Block, int kRows, class BeforeChunk>
FR_INLINE void multiply(const float* v, int64_t v_chunk_stride, int64_t chunks, const float* u, Ahead ahead,
                        Vec<Block::kLanes> (&sum)[kRows][Block::kCols], BeforeChunk&& before_chunk) {
  using V = Vec<Block::kLanes>;
  V total[kRows][Block::kCols];  // in memory: the registers are taken
  for (int64_t begin = 0;; begin += Block::kSegment) {
    unroll<kRows>([&](auto row)
                      FR_LAMBDA { unroll<Block::kCols>([&](auto j) FR_LAMBDA { sum[row][j] = V{}; }); });
    const int64_t end = begin + Block::kSegment < chunks ? begin + Block::kSegment : chunks;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      before_chunk(chunk);
      // A loop: as unroll<kChunk> it makes the same code and takes twice as long to compile.
#pragma GCC unroll 16
      for (int c = 0; c < kChunk; ++c) {
        __builtin_prefetch(ahead.next + 2 * c * kCacheLine);
        __builtin_prefetch(ahead.next + (2 * c + 1) * kCacheLine);
        V weight[Block::kCols];
        unroll<Block::kCols>([&](auto j) FR_LAMBDA {
          weight[j] = load<Block::kLanes>(u + c * Block::kPanel + j * Block::kLanes);
        });
        unroll<kRows>([&](auto row) FR_LAMBDA {
          const float value = v[row * kChunk + c];
          unroll<Block::kCols>([&](auto j) FR_LAMBDA { Block::multiply_add(sum[row][j], value, weight[j]); });
        });
        // Compilers would issue all the prefetches of a chunk at once, and loads would wait behind them.
        __asm__ __volatile__("" ::: "memory");
      }
      v += v_chunk_stride;
      u += kChunk * Block::kPanel;
      ahead.next += ahead.step;
    }
    if (begin > 0) {
      unroll<kRows>([&](auto row) FR_LAMBDA {
        unroll<Block::kCols>([&](auto j) FR_LAMBDA { sum[row][j] += total[row][j]; });
      });
    }
    if (end == chunks) return;
    unroll<kRows>([&](auto row) FR_LAMBDA {
      unroll<Block::kCols>([&](auto j) FR_LAMBDA { total[row][j] = sum[row][j]; });
    });
  }
}

#if defined(__GNUC__) && !defined(__clang__)
  #pragma GCC diagnostic pop
#endif

// Functions by their number of rows, 1 to kRows: Kernel<Block, n>::run.
template <class Block, template <class, int> class Kernel, int... kIndex>
constexpr std::array<decltype(&Kernel<Block, 1>::run), Block::kRows> by_rows(
    std::integer_sequence<int, kIndex...>) {
  return {&Kernel<Block, kIndex + 1>::run...};
}

// All the rows of a block with one panel, in groups of nearly equal height, so that none is left with one or
// two rows, where the multiply-adds would wait for one another: run(kernel, first row, group, groups).
template <class Block, template <class, int> class Kernel, class Run>
FR_INLINE void for_groups(int64_t rows, Run&& run) {
  static constexpr auto kKernels = by_rows<Block, Kernel>(std::make_integer_sequence<int, Block::kRows>{});
  const int64_t groups = ceil_div(rows, Block::kRows);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = rows * group / groups, last = rows * (group + 1) / groups;
    run(kKernels[last - first - 1], first, group, groups);
  }
}

// A panel of weights to be fetched while `groups` groups work, an equal part by each.
template <class Block>
FR_INLINE Ahead fetch_panel(const float* panel, int64_t chunks, int64_t group, int64_t groups) {
  const int64_t step = ceil_div(kChunk * Block::kPanel, groups);
  return {panel + group * chunks * step, step};
}

// The products, stored or, with `add`, added to what is there.
template <class Block, int kRows>
struct StoreProducts {
  static void run(const float* v, int64_t v_chunk_stride, int64_t chunks, const float* u, Ahead ahead,
                  float* m, int64_t m_stride, bool add) {
    Vec<Block::kLanes> sum[kRows][Block::kCols] = {};
    multiply<Block, kRows>(v, v_chunk_stride, chunks, u, ahead, sum, [](int64_t) FR_LAMBDA {});
    if (add) {
      unroll<kRows>([&](auto row) FR_LAMBDA {
        unroll<Block::kCols>([&](auto j) FR_LAMBDA {
          sum[row][j] += load<Block::kLanes>(m + row * m_stride + j * Block::kLanes);
        });
      });
    }
    unroll<kRows>([&](auto row) FR_LAMBDA {
      unroll<Block::kCols>([&](auto j) FR_LAMBDA {
        store<Block::kLanes>(m + row * m_stride + j * Block::kLanes, sum[row][j]);
      });
    });
  }
};

}  // namespace fused_resnet::cpu
