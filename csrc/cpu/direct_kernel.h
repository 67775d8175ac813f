// Direct convolution for one instruction set: any filter, stride and dilation, as a GEMM over blocks of
// output pixels.
//
//   V [depth / kChunk][pixel][kChunk]    the inputs of each pixel of the block (im2col, in the cache)
//   U [panel][depth][kPanel]             weights
//
// Products go from registers through the epilogue to the output. V and U are words: a float32 each, or two
// neighbours in depth in bfloat16.
//
// The depth runs over taps and, within a tap, channels. Where C fills whole chunks a chunk lies within one
// tap. Otherwise (a stem's 3 channels) taps follow each other without gaps but for half a word at the end of
// a row of the filter, and a pixel's inputs are first put in a line.
//
// Gathering copies each input R S / stride^2 times; against the K multiply-adds made with each copy that is
// little.
#pragma once

#include <algorithm>
#include <cstring>

#include "conv.h"
#include "finish.h"
#include "gemm.h"
#include "memory.h"

namespace fused_resnet::cpu {

// Scale, shift, residual, activation and store for kRows consecutive pixels and the panel that begins with
// channel k. y and residual are dense: a pixel is K floats.
template <class Block, int kRows, Residual kResidual>
FR_INLINE void finish_products(const Vec<Block::kLanes> (&sum)[kRows][Block::kCols],
                               const ConvProblem& problem, int64_t k, Bounds bounds,
                               const typename Block::Element* residual, typename Block::Element* y) {
  constexpr int kLanes = Block::kLanes;
  const int64_t k_count = problem.shape.k;
  unroll<Block::kCols>([&](auto j) FR_LAMBDA {
    const int64_t offset = j * kLanes, count = k_count - k - offset;
    if (count <= 0) return;
    const Vec<kLanes> scale = load<kLanes>(problem.scale + k + offset);
    const Vec<kLanes> shift = load<kLanes>(problem.shift + k + offset);
    unroll<kRows>([&](auto row) FR_LAMBDA {
      const int64_t at = row * k_count + offset;
      finish<AllSteps<kResidual>, kLanes, Lanes::kEither>(
          sum[row][j], scale, shift, bounds, residual == nullptr ? nullptr : residual + at, y + at, count);
    });
  });
}

// The products of kRows consecutive pixels with one panel, finished.
template <class Block, int kRows>
struct FinishProducts {
  static void run(const float* v, int64_t v_chunk_stride, int64_t chunks, const float* u, Ahead ahead,
                  const ConvProblem& problem, int64_t k, Bounds bounds, int64_t out) {
    constexpr int kLanes = Block::kLanes, kCols = Block::kCols;
    const int64_t k_count = problem.shape.k;
    using Element = typename Block::Element;
    constexpr int kLine = kCacheLine * int(sizeof(float) / sizeof(Element));
    Element* y = problem.output<Element>() + out;
    const Element* residual = problem.residual ? problem.added<Element>() + out : nullptr;
    // What the end will need is fetched meanwhile, a row or a few with each chunk: all at once would hold up
    // the loads of the products.
    const int64_t rows_at_once = ceil_div(kRows, chunks);
    Vec<kLanes> sum[kRows][kCols] = {};
    multiply<Block, kRows>(v, v_chunk_stride, chunks, u, ahead, sum, [&](int64_t chunk) FR_LAMBDA {
      const int64_t end = std::min<int64_t>((chunk + 1) * rows_at_once, kRows);
      for (int64_t at = chunk * rows_at_once * k_count; at < end * k_count; at += k_count) {
        for (int j = 0; j < Block::kPanel; j += kLine) {
          __builtin_prefetch(y + at + j, 1);
          if (residual) __builtin_prefetch(residual + at + j);
        }
      }
    });
    finish_products<Block, kRows, Residual::kUnlessNull>(sum, problem, k, bounds, residual, y);
  }
};

template <class Block>
struct DirectImpl {
  static constexpr int kLanes = Block::kLanes, kPanel = Block::kPanel;
  using V = Vec<kLanes>;
  using Element = typename Block::Element;
  static constexpr int64_t kPerWord = sizeof(float) / sizeof(Element);
  static constexpr int64_t kChunkValues = kPerWord * kChunk;

  // A row of the filter begins with a word.
  static int64_t row_values(const ConvShape& shape) {
    return ceil_div(shape.s * shape.c, kPerWord) * kPerWord;
  }
  // In words.
  static int64_t depth_of(const ConvShape& shape) {
    return ceil_div(shape.r * row_values(shape), kChunkValues) * kChunk;
  }
  static int64_t weight_floats(const ConvShape& shape) {
    return ceil_div(shape.k, kPanel) * depth_of(shape) * kPanel;
  }

  static void pack_weights(const ConvShape& shape, const float* weight, const int64_t stride[4],
                           int64_t first_panel, int64_t last_panel, float* packed) {
    const int64_t depth = depth_of(shape);
    std::fill(packed + first_panel * depth * kPanel, packed + last_panel * depth * kPanel, 0.0f);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      auto* out = reinterpret_cast<Element*>(packed + panel * depth * kPanel);
      const int64_t channels = std::min<int64_t>(shape.k - panel * kPanel, kPanel);
      for (int64_t tap = 0; tap < shape.r * shape.s; ++tap) {
        int64_t at = tap / shape.s * row_values(shape) + tap % shape.s * shape.c;  // in depth
        const float* from =
            weight + panel * kPanel * stride[0] + tap / shape.s * stride[2] + tap % shape.s * stride[3];
        for (int64_t c = 0; c < shape.c; ++c, ++at) {
          Element* to = out + at / kPerWord * kPerWord * kPanel + at % kPerWord;
          for (int64_t k = 0; k < channels; ++k) {
            to[k * kPerWord] = rounded<Element>(from[k * stride[0] + c * stride[1]]);
          }
        }
      }
    }
  }

  // An output pixel and where its window begins in the input. Stepping from one to the next saves four
  // divisions a pixel.
  struct Window {
    const ConvShape& shape;
    int64_t image, p, q;
    Window(const ConvShape& s, int64_t pixel)
        : shape(s), image(pixel / (s.p * s.q)), p(pixel / s.q % s.p), q(pixel % s.q) {}
    void step() {
      if (++q < shape.q) return;
      q = 0;
      if (++p < shape.p) return;
      p = 0;
      ++image;
    }
    int64_t top() const { return p * shape.stride_h - shape.pad_h; }
    int64_t left() const { return q * shape.stride_w - shape.pad_w; }
  };

  // The inputs of one output pixel, tap by tap: put(depth index, pointer to C values, or nullptr for
  // padding).
  template <class Put>
  static FR_INLINE void visit_taps(const ConvProblem& problem, const Window& window, Put&& put) {
    const ConvShape& shape = problem.shape;
    const int64_t top = window.top(), left = window.left();
    const Element* x = problem.input<Element>() + window.image * problem.x_stride[0];
    for (int64_t r = 0; r < shape.r; ++r) {
      const int64_t h = top + r * shape.dilation_h;
      int64_t depth = r * row_values(shape);
      for (int64_t s = 0; s < shape.s; ++s, depth += shape.c) {
        const int64_t w = left + s * shape.dilation_w;
        const bool inside = h >= 0 && h < shape.h && w >= 0 && w < shape.w;
        put(depth, inside ? x + h * problem.x_stride[1] + w * problem.x_stride[2] : nullptr);
      }
    }
  }

  static void copy_chunk(const Element* from, float* to) {
    const auto* words = reinterpret_cast<const float*>(from);
    unroll<kChunk / kLanes>(
        [&](auto i) FR_LAMBDA { store<kLanes>(to + i * kLanes, load<kLanes>(words + i * kLanes)); });
  }

  // Pieces as long as may be, the last overlapping the one before: nothing beyond `count` is touched.
  template <int64_t kPiece = kLanes * kPerWord>
  static FR_INLINE void copy(const Element* from, Element* to, int64_t count) {
    if (count >= kPiece) {
      for (int64_t i = 0; i + kPiece < count; i += kPiece)
        std::memcpy(to + i, from + i, kPiece * sizeof(Element));
      std::memcpy(to + count - kPiece, from + count - kPiece, kPiece * sizeof(Element));
    } else if constexpr (kPiece > 1) {
      copy<kPiece / 2>(from, to, count);
    }
  }

  // The inputs of one output pixel in a line. Where pixels lie side by side, a whole row of the filter is
  // copied at once: a stem's 7 taps of 3 channels are 21 values.
  static FR_INLINE void put_in_line(const ConvProblem& problem, const Window& window, Element* line) {
    const ConvShape& shape = problem.shape;
    const int64_t c = shape.c, row = row_values(shape);
    if (row != shape.s * c) {
      for (int64_t r = 0; r < shape.r; ++r) line[(r + 1) * row - 1] = Element{};
    }
    if (shape.dilation_w != 1 || problem.x_stride[2] != c) {
      visit_taps(problem, window, [&](int64_t depth, const Element* from) FR_LAMBDA {
        if (from != nullptr) {
          copy(from, line + depth, c);
        } else {
          std::fill_n(line + depth, c, Element{});
        }
      });
      return;
    }
    const int64_t top = window.top(), left = window.left();
    const int64_t first = std::clamp<int64_t>(-left, 0, shape.s);  // the taps inside the image
    const int64_t last = std::clamp<int64_t>(shape.w - left, first, shape.s);
    const Element* x = problem.input<Element>() + window.image * problem.x_stride[0] + (left + first) * c;
    for (int64_t r = 0; r < shape.r; ++r, line += row) {
      const int64_t h = top + r * shape.dilation_h;
      if (h < 0 || h >= shape.h) {
        std::fill_n(line, shape.s * c, Element{});
        continue;
      }
      if (first > 0) std::fill_n(line, first * c, Element{});
      copy(x + h * problem.x_stride[1], line + first * c, (last - first) * c);
      if (last < shape.s) std::fill_n(line + last * c, (shape.s - last) * c, Element{});
    }
  }

  // V of a block of pixels; `lines` has room for all of them.
  static void gather(const ConvProblem& problem, int64_t first_pixel, int64_t pixels, const Element* zeros,
                     Element* lines, float* v) {
    const int64_t c = problem.shape.c, depth = depth_of(problem.shape) * kPerWord, v_chunk = pixels * kChunk;
    Window window(problem.shape, first_pixel);
    if (c % kChunkValues == 0) {
      for (int64_t i = 0; i < pixels; ++i, v += kChunk, window.step()) {
        visit_taps(problem, window, [&](int64_t at, const Element* from) FR_LAMBDA {
          const int64_t step = from != nullptr ? kChunkValues : 0;
          if (from == nullptr) from = zeros;
          float* to = v + at / kChunkValues * v_chunk;
          for (int64_t j = 0; j < c; j += kChunkValues, from += step, to += v_chunk) copy_chunk(from, to);
        });
      }
      return;
    }
    // All lines first: a chunk read back at once would wait for the stores that it spans.
    const int64_t taps = problem.shape.r * row_values(problem.shape);
    for (int64_t i = 0; i < pixels; ++i, window.step()) {
      put_in_line(problem, window, lines + i * depth);
      std::fill_n(lines + i * depth + taps, depth - taps, Element{});
    }
    for (int64_t i = 0; i < pixels; ++i, v += kChunk) {
      float* to = v;
      for (int64_t j = 0; j < depth; j += kChunkValues, to += v_chunk) copy_chunk(lines + i * depth + j, to);
    }
  }

  static ConvPlan plan(const ConvShape& shape, int threads) {
    const int64_t cache = level2_cache_bytes() / int64_t(sizeof(float));
    // Weights that stay in the cache are read again for each group of pixels, whose inputs stay in the
    // first-level cache meanwhile. Weights from beyond it are worth a few groups.
    const bool weights_stay = weight_floats(shape) <= cache / 2;
    ConvPlan plan = cut(shape.n * shape.p * shape.q, (weights_stay ? 1 : 4) * Block::kRows,
                        ceil_div(shape.k, kPanel), threads, weights_stay);
    plan.scratch_floats = scratch_floats(shape, plan.rows_per_block);
    return plan;
  }

  static int64_t scratch_floats(const ConvShape& shape, int64_t pixels) {
    return kChunk + (shape.c % kChunkValues == 0 ? 1 : 2) * pixels * depth_of(shape);
  }

  // Output pixels [first_pixel, first_pixel + pixels) and panels [first_panel, last_panel); the first pixel
  // is written to problem.y + out.
  static void compute(const ConvProblem& problem, int64_t first_pixel, int64_t pixels, int64_t first_panel,
                      int64_t last_panel, Bounds bounds, int64_t out, float* scratch) {
    const int64_t depth = depth_of(problem.shape), k = problem.shape.k;
    float* v = scratch + kChunk;

    std::fill_n(scratch, kChunk, 0.0f);
    gather(problem, first_pixel, pixels, reinterpret_cast<const Element*>(scratch),
           reinterpret_cast<Element*>(v + pixels * depth), v);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const float* u = problem.weights + panel * depth * kPanel;
      const float* next =
          panel + 1 < last_panel ? u + depth * kPanel : problem.weights + first_panel * depth * kPanel;
      for_groups<Block, FinishProducts>(
          pixels, [&](auto kernel, int64_t first, int64_t group, int64_t groups) {
            kernel(v + first * kChunk, pixels * kChunk, depth / kChunk, u,
                   fetch_panel<Block>(next, depth / kChunk, group, groups), problem, panel * kPanel, bounds,
                   out + first * k + panel * kPanel);
          });
    }
  }

  static void run_piece(const ConvProblem& problem, const ConvPlan& plan, int64_t piece, float* scratch) {
    const int64_t first_pixel = piece / plan.k_blocks * plan.rows_per_block;
    const int64_t pixels = std::min(plan.rows_per_block, plan.rows - first_pixel);
    const int64_t first_panel = piece % plan.k_blocks * plan.panels_per_block;
    const int64_t last_panel = std::min(first_panel + plan.panels_per_block, plan.panels);
    compute(problem, first_pixel, pixels, first_panel, last_panel, Bounds(problem.activation),
            first_pixel * problem.shape.k, scratch);
  }

  static constexpr ConvKernel kernel() { return {kPanel, &weight_floats, &pack_weights, &plan, &run_piece}; }
};

}  // namespace fused_resnet::cpu
