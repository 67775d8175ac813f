// Direct convolution with its epilogue and a max pool in one pass: a network's stem. The convolution's
// output, the largest tensor of the whole network, is never written to memory: a ring of its rows stays in
// the cache until the windows that need them are done.
//
// Rows computes the convolution row by row: DirectRows (row_kernel.h) or Bf16x3Stem (bf16x3_stem.h).
#pragma once

#include "row_kernel.h"
#include "scalars.h"

namespace fused_resnet::cpu {

template <class Rows>
struct PooledRows {
  using Element = typename Rows::Element;
  static constexpr int kLanes = Rows::kLanes;
  using V = Vec<kLanes>;
  using Bits = typename IntVecTypes<kLanes>::U32;

  static int64_t row_values(const ConvShape& shape) { return shape.q * shape.k; }
  static int64_t row_floats(const ConvShape& shape) {
    return ceil_div(row_values(shape) * int64_t(sizeof(Element)), int64_t(sizeof(float)));
  }
  // The rows of a row of windows, and the one that is computed while the windows are.
  static int64_t ring(const Pool& pool) { return pool.window_h + 1; }

  static int64_t scratch_floats(const ConvShape& shape, const Pool& pool) {
    return ring(pool) * row_floats(shape) + Rows::scratch_floats(shape);
  }

  // The larger of both; NaN where either is.
  template <bool kNonNegative>
  static FR_INLINE V maximum(V a, V b) {
    if constexpr (kNonNegative) {
      // As unsigned integers floats from +0 on have their own order, and NaNs of either sign are above them.
      // (So is -0: Bounds::before_max_pool leaves none.)
      return (Bits)b > (Bits)a ? b : a;
    } else {
      return ((b > a) | (b != b)) ? b : a;
    }
  }

  // A row of windows that waits to be computed.
  struct Windows {
    const ConvShape& shape;
    const Pool& pool;
    bool non_negative;
    const Element* rows[kMaxWindow];  // of the convolution
    int64_t row_count;
    Element* y;
    int64_t next;  // window

    // The next `count` of them.
    void compute(int64_t count) {
      const int64_t end = std::min(next + count, pool.q);
      if (non_negative) {
        for (; next < end; ++next) compute_window<true>();
      } else {
        for (; next < end; ++next) compute_window<false>();
      }
    }
    template <bool kNonNegative>
    FR_INLINE void compute_window() const {
      const int64_t left = next * pool.stride_w - pool.pad_w;
      const int64_t first = std::max<int64_t>(left, 0), last = std::min(left + pool.window_w, shape.q);
      for (int64_t k = 0; k < shape.k; k += kLanes) {
        const int64_t count = std::min<int64_t>(shape.k - k, kLanes);
        V value = kNonNegative ? V{} : V{} - __builtin_inff();
        for (int64_t r = 0; r < row_count; ++r) {
          const Element* from = rows[r] + first * shape.k + k;
          for (int64_t w = first; w < last; ++w, from += shape.k) {
            value = maximum<kNonNegative>(
                value, count == kLanes ? load<kLanes>(from) : load_partial<kLanes>(from, count));
          }
        }
        Element* to = y + next * shape.k + k;
        if (count == kLanes) {
          store<kLanes>(to, value);
        } else {
          store_partial<kLanes>(to, value, count);
        }
      }
    }
  };
  static constexpr int64_t kWindowsAtOnce = 2;

  // Rows [first, last) of windows of one image; problem.y is where the pooled output lies, [n, pool.p,
  // pool.q, K].
  static void run(const ConvProblem& problem, const Pool& pool, int64_t image, int64_t first, int64_t last,
                  float* scratch) {
    const ConvShape& shape = problem.shape;
    const int64_t slot = row_floats(shape);
    const auto row = [&](int64_t h)
                         FR_LAMBDA { return reinterpret_cast<Element*>(scratch + h % ring(pool) * slot); };
    int64_t done = std::max<int64_t>(first * pool.stride_h - pool.pad_h, 0);  // rows before it are not needed
    Rows rows(problem, image, done, scratch + ring(pool) * slot);
    Windows windows{shape, pool, problem.activation != Activation::kNone, {}, 0, nullptr, pool.q};
    const auto complete = [&]() FR_LAMBDA {
      if (windows.next == pool.q) return;
      rows.finish();
      windows.compute(pool.q);
    };
    for (int64_t p = first; p < last; ++p) {
      const int64_t top = std::max<int64_t>(p * pool.stride_h - pool.pad_h, 0);
      const int64_t bottom = std::min(p * pool.stride_h - pool.pad_h + pool.window_h, shape.p);
      if (done < top) complete();  // the ring's slots no longer follow one another
      for (done = std::max(done, top); done < bottom; ++done) {
        rows.compute(done, row(done), [&]() FR_LAMBDA { windows.compute(kWindowsAtOnce); });
        windows.compute(pool.q);
      }
      complete();
      for (int64_t h = top; h < bottom; ++h) windows.rows[h - top] = row(h);
      windows.row_count = bottom - top;
      windows.y = problem.output<Element>() + (image * pool.p + p) * pool.q * shape.k;
      windows.next = 0;
    }
    complete();
  }

  static constexpr PooledKernel kernel() {
    return {Rows::kPanel, &Rows::weight_floats, &Rows::pack_weights, &Rows::can_run, &scratch_floats, &run};
  }
};

template <class Block>
using PooledImpl = PooledRows<DirectRows<Block>>;

}  // namespace fused_resnet::cpu
