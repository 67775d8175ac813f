// One row of a direct convolution of few channels, without gathering: where the pixels of the input lie side
// by side, a row of the filter is one run of S C values, and the runs of neighbouring output pixels are
// stride C apart. The micro-kernel reads them from the input's rows as they are (with the padding put on).
//
// The weights are those of DirectImpl, the sums are added in its order: the same bits.
#pragma once

#include "direct_kernel.h"

namespace fused_resnet::cpu {

// `kValues` values as one word, the rest of it 0.
template <int64_t kValues, class T>
FR_INLINE float word(const T* values) {
  float result = 0;
  std::memcpy(&result, values, kValues * sizeof(T));
  return result;
}

// Neighbouring pixels are kStep values apart.
template <int kStep>
struct RowRuns {
  template <class Block, int kRows>
  struct Products {
    using Element = typename Block::Element;
    static constexpr int64_t kPerWord = DirectImpl<Block>::kPerWord;

    // rows[r]: where the run of filter row r begins for the first of kRows pixels; depth in words.
    static void run(const Element* const* rows, int64_t offset, int64_t run_values, int64_t depth,
                    const float* u, const ConvProblem& problem, int64_t k, Bounds bounds, Element* y) {
      using V = Vec<Block::kLanes>;
      constexpr int64_t kSegmentWords = Block::kSegment * kChunk;
      const int64_t run_words = ceil_div(run_values, kPerWord), whole_words = run_values / kPerWord;
      V sum[kRows][Block::kCols] = {}, total[kRows][Block::kCols] = {};
      int64_t r = 0, i = 0;
      for (int64_t begin = 0; begin < depth; begin += kSegmentWords) {
        unroll<kRows>([&](auto row)
                          FR_LAMBDA { unroll<Block::kCols>([&](auto j) FR_LAMBDA { sum[row][j] = V{}; }); });
        const int64_t end = std::min(begin + kSegmentWords, depth);
        for (int64_t d = begin; d < end;) {
          const int64_t count = std::min(run_words - i, end - d);
          const Element* v = rows[r] + offset + i * kPerWord;
          const auto multiply_word = [&](auto values) FR_LAMBDA {
            V weight[Block::kCols];
            unroll<Block::kCols>([&](auto j)
                                     FR_LAMBDA { weight[j] = load<Block::kLanes>(u + j * Block::kLanes); });
            unroll<kRows>([&](auto row) FR_LAMBDA {
              const float value = word<decltype(values)::value>(v + row * kStep);
              unroll<Block::kCols>([&](auto j)
                                       FR_LAMBDA { Block::multiply_add(sum[row][j], value, weight[j]); });
            });
            u += Block::kPanel;
            v += kPerWord;
          };
          const int64_t whole = std::min(count, whole_words - i);
          for (int64_t t = 0; t < whole; ++t) multiply_word(std::integral_constant<int64_t, kPerWord>{});
          // What follows an odd run is another pixel's.
          if (whole < count) multiply_word(std::integral_constant<int64_t, 1>{});
          d += count;
          i += count;
          if (i == run_words) i = 0, ++r;
        }
        if (begin > 0) {
          unroll<kRows>([&](auto row) FR_LAMBDA {
            unroll<Block::kCols>([&](auto j) FR_LAMBDA { sum[row][j] += total[row][j]; });
          });
        }
        if (end == depth) break;
        unroll<kRows>([&](auto row) FR_LAMBDA {
          unroll<Block::kCols>([&](auto j) FR_LAMBDA { total[row][j] = sum[row][j]; });
        });
      }
      finish_products<Block, kRows, Residual::kNone>(sum, problem, k, bounds, nullptr, y);
    }
  };
};

template <class Block>
struct RowImpl {
  using Element = typename Block::Element;
  static constexpr int64_t kMostRows = 8;  // of a filter

  static int64_t step(const ConvShape& shape) { return shape.stride_w * shape.c; }
  // Three channels at stride 1 and 2; elsewhere gathering costs little.
  static bool can_run(const ConvProblem& problem) {
    const ConvShape& shape = problem.shape;
    return (step(shape) == 3 || step(shape) == 6) && shape.dilation_w == 1 && shape.r <= kMostRows &&
           problem.x_stride[2] == shape.c && problem.residual == nullptr;
  }

  // Rows of the input with their padding: a ring of those that one row of the output reads, and one of zeros.
  static int64_t ring(const ConvShape& shape) { return (shape.r - 1) * shape.dilation_h + 1; }
  static int64_t padded_row(const ConvShape& shape) { return (shape.w + 2 * shape.pad_w) * shape.c; }
  static int64_t scratch_floats(const ConvShape& shape) {
    return ceil_div((ring(shape) + 1) * padded_row(shape), DirectImpl<Block>::kPerWord);
  }

  // Before the first row of an image.
  static void start(const ConvShape& shape, float* scratch) {
    std::fill_n(scratch, scratch_floats(shape), 0.0f);
  }

  // Row p of the output to y. `seen`: the number of the input row from which on none is in the ring yet.
  static void compute(const ConvProblem& problem, int64_t image, int64_t p, int64_t& seen, Element* y,
                      Element* scratch) {
    const ConvShape& shape = problem.shape;
    const int64_t row_values = padded_row(shape), top = p * shape.stride_h - shape.pad_h;
    const Element* rows[kMostRows];
    for (int64_t r = 0; r < shape.r; ++r) {
      const int64_t h = top + r * shape.dilation_h;
      if (h < 0 || h >= shape.h) {
        rows[r] = scratch + ring(shape) * row_values;  // zeros
        continue;
      }
      for (seen = std::max(seen, top); seen <= h; ++seen) {
        if (seen < 0) continue;
        Element* to = scratch + seen % ring(shape) * row_values + shape.pad_w * shape.c;
        std::copy_n(problem.input<Element>() + image * problem.x_stride[0] + seen * problem.x_stride[1],
                    shape.w * shape.c, to);
      }
      rows[r] = scratch + h % ring(shape) * row_values;
    }
    if (step(shape) == 3) {
      multiply_row<RowRuns<3>>(problem, rows, y);
    } else {
      multiply_row<RowRuns<6>>(problem, rows, y);
    }
  }

  template <class Runs>
  static void multiply_row(const ConvProblem& problem, const Element* const* rows, Element* y) {
    const ConvShape& shape = problem.shape;
    const int64_t run_values = shape.s * shape.c;
    const int64_t depth = shape.r * ceil_div(run_values, DirectImpl<Block>::kPerWord);
    const int64_t u_panel = DirectImpl<Block>::depth_of(shape) * Block::kPanel;
    const Bounds bounds = Bounds::before_max_pool(problem.activation);
    for (int64_t k = 0; k < shape.k; k += Block::kPanel) {
      const float* u = problem.weights + k / Block::kPanel * u_panel;
      for_groups<Block, Runs::template Products>(shape.q, [&](auto kernel, int64_t first, int64_t, int64_t) {
        kernel(rows, first * step(shape), run_values, depth, u, problem, k, bounds, y + first * shape.k + k);
      });
    }
  }
};

// Rows of one image for PooledImpl: by RowImpl where it can, gathered otherwise.
template <class Block>
struct DirectRows {
  using Element = typename Block::Element;
  using Rows = RowImpl<Block>;
  using Direct = DirectImpl<Block>;
  static constexpr int kLanes = Block::kLanes;
  static constexpr int kPanel = Block::kPanel;
  static constexpr int64_t kPixels = 2 * Block::kRows;  // gathered at a time

  static int64_t weight_floats(const ConvShape& shape) { return Direct::weight_floats(shape); }
  static void pack_weights(const ConvShape& shape, const float* weight, const int64_t stride[4],
                           int64_t first_panel, int64_t last_panel, float* packed) {
    Direct::pack_weights(shape, weight, stride, first_panel, last_panel, packed);
  }
  static bool can_run(const ConvShape&) { return true; }
  static int64_t scratch_floats(const ConvShape& shape) {
    return std::max<int64_t>(Direct::scratch_floats(shape, kPixels), Rows::scratch_floats(shape));
  }

  DirectRows(const ConvProblem& problem, int64_t image, int64_t /*first_row*/, float* scratch)
      : problem_(problem), image_(image), scratch_(scratch), by_rows_(Rows::can_run(problem)) {
    if (by_rows_) Rows::start(problem.shape, scratch);
  }

  template <class Between>
  void compute(int64_t p, Element* y, Between&&) {
    if (by_rows_) {
      Rows::compute(problem_, image_, p, seen_, y, reinterpret_cast<Element*>(scratch_));
      return;
    }
    const ConvShape& shape = problem_.shape;
    ConvProblem to_y = problem_;
    to_y.y = y;
    for (int64_t q = 0; q < shape.q; q += kPixels) {
      Direct::compute(to_y, (image_ * shape.p + p) * shape.q + q, std::min(kPixels, shape.q - q), 0,
                      ceil_div(shape.k, kPanel), Bounds::before_max_pool(problem_.activation), q * shape.k,
                      scratch_);
    }
  }
  void finish() {}

 private:
  const ConvProblem& problem_;
  const int64_t image_;
  float* const scratch_;
  const bool by_rows_;
  int64_t seen_ = 0;  // rows of the input
};

}  // namespace fused_resnet::cpu
