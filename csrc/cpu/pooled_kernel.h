// Direct convolution with its epilogue and a max pool in one pass: a network's stem. The convolution's
// output, the largest tensor of the whole network, is never written to memory: a ring of its rows stays in
// the cache until the windows that need them are done.
#pragma once

#include "direct_kernel.h"
#include "row_kernel.h"

namespace fused_resnet::cpu {

template <class Block>
struct PooledImpl {
  using Direct = DirectImpl<Block>;
  using Rows = RowImpl<Block>;
  static constexpr int kLanes = Block::kLanes;
  using V = Vec<kLanes>;
  static constexpr int64_t kPixels = 2 * Block::kRows;  // of a row at a time

  static int64_t row_floats(const ConvShape& shape) { return shape.q * shape.k; }

  static int64_t scratch_floats(const ConvShape& shape, const Pool& pool) {
    return pool.window_h * row_floats(shape) +
           std::max<int64_t>(Direct::scratch_floats(shape, kPixels), Rows::scratch_floats(shape));
  }

  // The larger of both; NaN where either is.
  static FR_INLINE V maximum(V a, V b) { return (b > a) | (b != b) ? b : a; }

  // One row of windows. rows[r]: the convolution's row for the window's row r, or nullptr outside the image.
  static void pool_row(const ConvShape& shape, const Pool& pool, const float* const* rows, float* y) {
    for (int64_t q = 0; q < pool.q; ++q, y += shape.k) {
      const int64_t left = q * pool.stride_w - pool.pad_w;
      const int64_t first = std::max<int64_t>(left, 0), last = std::min(left + pool.window_w, shape.q);
      for (int64_t k = 0; k < shape.k; k += kLanes) {
        const int64_t count = std::min<int64_t>(shape.k - k, kLanes);
        V value = V{} - __builtin_inff();
        for (int64_t r = 0; r < pool.window_h; ++r) {
          if (rows[r] == nullptr) continue;
          for (int64_t w = first; w < last; ++w) {
            const float* from = rows[r] + w * shape.k + k;
            value = maximum(value, count == kLanes ? load<kLanes>(from) : load_partial<kLanes>(from, count));
          }
        }
        if (count == kLanes) {
          store<kLanes>(y + k, value);
        } else {
          store_partial<kLanes>(y + k, value, count);
        }
      }
    }
  }

  // Rows [first, last) of windows of one image; problem.y is where the pooled output lies, [n, pool.p,
  // pool.q, K].
  static void run(const ConvProblem& problem, const Pool& pool, int64_t image, int64_t first, int64_t last,
                  float* scratch) {
    const ConvShape& shape = problem.shape;
    const int64_t panels = ceil_div(shape.k, Block::kPanel);
    ConvProblem into_ring = problem;
    into_ring.y = scratch;
    float* conv_scratch = scratch + pool.window_h * row_floats(shape);
    const bool by_rows = Rows::can_run(problem);
    int64_t seen = 0;  // rows of the input
    if (by_rows) Rows::start(shape, conv_scratch);
    int64_t done = std::max<int64_t>(first * pool.stride_h - pool.pad_h, 0);  // rows before it are not needed
    for (int64_t p = first; p < last; ++p) {
      const int64_t top = p * pool.stride_h - pool.pad_h, bottom = std::min(top + pool.window_h, shape.p);
      for (done = std::max(done, top); done < bottom; ++done) {
        const int64_t row = (image * shape.p + done) * shape.q,
                      slot = done % pool.window_h * row_floats(shape);
        if (by_rows) {
          Rows::compute(problem, image, done, seen, scratch + slot, conv_scratch);
          continue;
        }
        for (int64_t q = 0; q < shape.q; q += kPixels) {
          Direct::compute(into_ring, row + q, std::min(kPixels, shape.q - q), 0, panels, slot + q * shape.k,
                          conv_scratch);
        }
      }
      const float* rows[kMaxWindow];
      for (int64_t r = 0; r < pool.window_h; ++r) {
        const int64_t h = top + r;
        rows[r] = h >= 0 && h < shape.p ? scratch + h % pool.window_h * row_floats(shape) : nullptr;
      }
      pool_row(shape, pool, rows, problem.y + (image * pool.p + p) * pool.q * shape.k);
    }
  }

  static constexpr PooledKernel kernel() { return {&scratch_floats, &run}; }
};

}  // namespace fused_resnet::cpu
