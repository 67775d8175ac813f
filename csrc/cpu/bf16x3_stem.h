// One row of a direct convolution of few channels on matrix tiles: float32 products from bfloat16 ones
// (bf16x3.h), and nothing gathered. The parts of the input lie in a window that rolls down the image:
//
//   input (row h, column w, channel c) at ((h - top) + w R) C + c,   R rows of the filter, columns padded
//
// So the inputs of one output pixel, all taps and channels, are R S C values in a line, in the order s, r, c;
// those of the pixel to the right lie stride_w R C further, those of the pixel below stride_h C further: the
// next row of the output begins further along the same memory. The rows that it no longer needs make room for
// the new ones: the slot of (h + R, w - 1) is that of (h, w). Each input is written once.
//
//   U [panel][step][part][2][16][16][2]   weights as B tiles; a step is 32 of the R S C values
//
// The last step ends where the line ends. What it has in common with the step before has zeros for weights
// in one of them; no step reads beyond the pixel's own inputs, where a NaN could be that is none of its own.
#pragma once

#include <algorithm>

#include "bf16x3.h"
#include "direct_kernel.h"
#include "tiles.h"

namespace fused_resnet::cpu {

template <class Tiles, int kLanes_>
struct Bf16x3Stem {
  using Element = float;
  static constexpr int kLanes = kLanes_;
  using V = Vec<kLanes>;
  static constexpr int64_t kPanel = 2 * kTileCols;  // output channels
  static constexpr int64_t kGroup = 2 * kTileRows;  // output pixels
  static constexpr int64_t kTileValues = kTileRows * kTileDepth;
  static constexpr int64_t kStepValues = kParts * 2 * kTileValues;  // of U
  static constexpr int64_t kMostChannels = 16;

  // The products as in bf16x3.h, but x's parts change less often: their rows, which begin anywhere, straddle
  // two cache lines each.
  static constexpr PartsOfProduct kOrder[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
  static constexpr int64_t kProductsOfStep = sizeof(kOrder) / sizeof(kOrder[0]);

  // With many channels a tap alone fills a step. x must be dense from pixel to pixel.
  static bool can_run(const ConvShape& shape) {
    return shape.dilation_h == 1 && shape.dilation_w == 1 && shape.stride_h <= shape.r &&
           shape.c <= kMostChannels && depth_of(shape) >= kTileDepth;
  }

  static int64_t depth_of(const ConvShape& shape) { return shape.r * shape.s * shape.c; }
  static int64_t steps_of(const ConvShape& shape) { return ceil_div(depth_of(shape), kTileDepth); }
  static int64_t offset_of_step(const ConvShape& shape, int64_t step) {
    return std::min(step * kTileDepth, depth_of(shape) - kTileDepth);
  }

  static int64_t weight_floats(const ConvShape& shape) {
    return ceil_div(shape.k, kPanel) * steps_of(shape) * kStepValues / 2;
  }

  static void pack_weights(const ConvShape& shape, const float* weight, const int64_t stride[4],
                           int64_t first_panel, int64_t last_panel, float* packed) {
    BFloat16* out = reinterpret_cast<BFloat16*>(packed) + first_panel * steps_of(shape) * kStepValues;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t k_count = std::min<int64_t>(shape.k - panel * kPanel, kPanel);
      for (int64_t step = 0; step < steps_of(shape); ++step, out += kStepValues) {
        alignas(64) float values[2 * kTileValues] = {};  // [2][16][16][2], as in U
        const int64_t offset = offset_of_step(shape, step);
        for (int64_t i = step * kTileDepth - offset; i < kTileDepth; ++i) {
          const int64_t at = offset + i, c = at % shape.c, r = at / shape.c % shape.r,
                        s = at / shape.c / shape.r;
          const float* from =
              weight + panel * kPanel * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
          for (int64_t k = 0; k < k_count; ++k) {
            values[k / kTileCols * kTileValues + i / 2 * kTileDepth + k % kTileCols * 2 + i % 2] =
                from[k * stride[0]];
          }
        }
        for (int64_t i = 0; i < 2 * kTileValues; i += 2 * kLanes) {
          store_bf16x3<kLanes>(load<kLanes>(values + i), load<kLanes>(values + i + kLanes), out + i,
                               2 * kTileValues);
        }
      }
    }
  }

  // Scratch memory and where in it things lie.
  struct Layout {
    int64_t columns;           // of the padded image, and as many more as the last tile reads
    int64_t block_part, part;  // values of one part: of a row of a block of columns, of the window
    explicit Layout(const ConvShape& shape) {
      const int64_t pixels = ceil_div(shape.q, kTileRows) * kTileRows;
      columns = std::max(shape.w + 2 * shape.pad_w, (pixels - 1) * shape.stride_w + shape.s);
      block_part = ceil_div(kColumns * shape.c, 2 * kLanes) * 2 * kLanes + kLanes;
      part = ceil_div((columns * shape.r + shape.p * shape.stride_h) * shape.c, kTileDepth) * kTileDepth;
    }
    int64_t floats() const { return 2 * kGroup * kPanel + ceil_div(kParts * (2 * block_part + part), 2); }
  };
  static int64_t scratch_floats(const ConvShape& shape) { return Layout(shape).floats(); }

  // Rows of one image from `first_row` of the output on.
  Bf16x3Stem(const ConvProblem& problem, int64_t image, int64_t first_row, float* scratch)
      : problem_(problem),
        shape_(problem.shape),
        layout_(problem.shape),
        bounds_(Bounds::before_max_pool(problem.activation)),
        x_(problem.input<float>() + image * problem.x_stride[0]),
        first_top_(top_of(first_row)),
        sums_(scratch),
        block_(reinterpret_cast<BFloat16*>(sums_ + 2 * kGroup * kPanel)),
        window_(block_ + 2 * kParts * layout_.block_part) {
    begin_rows(first_top_);
  }
  // Written out, since GCC compiles implicit ones for no instruction set in particular.
  ~Bf16x3Stem() {}

  // Row p of the output, below the one before, to y, dense. It is there after the next call or finish().
  // between() is called many times, each time for a little work that does not hold up the tiles.
  template <class Between>
  void compute(int64_t p, float* y, Between&& between) {
    const int64_t top = top_of(p);
    while (next_block_ < blocks()) put_block();
    if (rows_end_ < top + shape_.r) {
      begin_rows(top);
      while (next_block_ < blocks()) put_block();
    }
    finish();
    if (p + 1 < shape_.p) begin_rows(top + shape_.stride_h);

    const BFloat16* x = window_ + (top - first_top_) * shape_.c;
    const int64_t panels = ceil_div(shape_.k, kPanel);
    const int64_t pixel = shape_.stride_w * shape_.r * shape_.c;
    for (int64_t q = 0; q < shape_.q; q += kGroup) {
      const bool two_tiles = shape_.q - q > kTileRows;
      const auto meanwhile = [&]() FR_LAMBDA {
        if (next_block_ < blocks() && column_of_block(next_block_ + 1) < q * shape_.stride_w) put_block();
        between();
      };
      for (int64_t panel = 0; panel < panels;) {
        if (two_tiles) {
          multiply<2, 1>(x + q * pixel, q, panel, y, meanwhile);
          panel += 1;
        } else if (panels - panel > 1) {
          multiply<1, 2>(x + q * pixel, q, panel, y, meanwhile);
          panel += 2;
        } else {
          multiply<1, 1>(x + q * pixel, q, panel, y, meanwhile);
          panel += 1;
        }
      }
    }
  }

  void finish() {
    before_.finish(0, before_.pixels);
    before_.pixels = 0;
  }

 private:
  int64_t top_of(int64_t p) const { return p * shape_.stride_h - shape_.pad_h; }

  // ---- the window ----
  // New rows are put block by block. The slot of a column's new row is that of the next column's old one: a
  // block ends one column before those that a group begins with.
  static constexpr int64_t kColumns = 32;  // of a block
  int64_t blocks() const { return ceil_div(layout_.columns + 1, kColumns); }
  int64_t column_of_block(int64_t block) const {
    return std::clamp<int64_t>(block * kColumns - 1, 0, layout_.columns);
  }

  // The rows that a row of the output whose first is `top` needs and the window has not.
  void begin_rows(int64_t top) {
    rows_begin_ = next_row_ = std::max(rows_end_, top);
    rows_end_ = top + shape_.r;
    next_block_ = 0;
  }

  // One or two rows of the next block.
  void put_block() {
    const int64_t begin = column_of_block(next_block_), count = column_of_block(next_block_ + 1) - begin;
    const int64_t h = next_row_, rows = std::min<int64_t>(rows_end_ - h, 2);
    next_row_ += rows;
    if (next_row_ == rows_end_) next_row_ = rows_begin_, ++next_block_;
    for (int64_t j = 0; j < rows; ++j) {
      convert_block(h + j, begin - shape_.pad_w, count, block_ + j * kParts * layout_.block_part);
    }
    BFloat16* to = window_ + (h - first_top_ + begin * shape_.r) * shape_.c;
    for (int part = 0; part < kParts; ++part, to += layout_.part) {
      scatter(block_ + part * layout_.block_part, rows, count, to);
    }
  }

  // `count` columns of a row of the input, zeros outside the image.
  void convert_block(int64_t h, int64_t first, int64_t count, BFloat16* to) const {
    const int64_t c = shape_.c, vectors = ceil_div(count * c, 2 * kLanes);
    const float* from = x_ + h * problem_.x_stride[1] + first * c;
    float values[kColumns * kMostChannels];
    const bool row_inside = h >= 0 && h < shape_.h;
    if (!row_inside || first < 0 || first * c + vectors * 2 * kLanes > shape_.w * c) {
      std::fill_n(values, vectors * 2 * kLanes, 0.0f);
      const int64_t left = std::clamp<int64_t>(-first, 0, count);
      const int64_t right = std::clamp<int64_t>(shape_.w - first, left, count);
      if (row_inside) std::copy(from + left * c, from + right * c, values + left * c);
      from = values;
    }
    for (int64_t i = 0; i < vectors * 2 * kLanes; i += 2 * kLanes) {
      store_bf16x3<kLanes>(load<kLanes>(from + i), load<kLanes>(from + i + kLanes), to + i,
                           layout_.block_part);
    }
  }

  // Two rows at once where they fit a vector: the fewer stores the better.
  void scatter(const BFloat16* from, int64_t rows, int64_t count, BFloat16* to) const {
    const int64_t c = shape_.c, step = shape_.r * c, row = kParts * layout_.block_part;
#if defined(FR_TARGET_AMX)
    if (rows * c <= 8) {
      alignas(16) uint16_t index[8] = {};  // of the second row from 8 on
      for (int64_t i = 0; i < rows * c; ++i) index[i] = static_cast<uint16_t>(i < c ? i : 8 + i - c);
      const __m128i both = _mm_load_si128(reinterpret_cast<const __m128i*>(index));
      const __mmask8 mask = static_cast<__mmask8>((1 << rows * c) - 1);
      const BFloat16* second = from + (rows - 1) * row;
      for (int64_t i = 0; i < count; ++i) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * c));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second + i * c));
        _mm_mask_storeu_epi16(to + i * step, mask, _mm_permutex2var_epi16(a, both, b));
      }
      return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        std::memcpy(to + i * step + j * c, from + j * row + i * c, c * sizeof(BFloat16));
      }
    }
  }

  // ---- products ----
  // Sums of a group that wait for their scale, shift and activation.
  struct Pending {
    const float* sums;  // [pixels][width]
    int64_t width, pixels, count, k;
    const float *scale, *shift;
    Bounds bounds{Activation::kNone};
    float* y;

    FR_INLINE void finish(int64_t begin, int64_t end) const {
      if (begin >= pixels) return;
      end = std::min(end, pixels);
      if (count % kLanes == 0) {
        finish_rows<Lanes::kAll>(begin, end);
      } else {
        finish_rows<Lanes::kEither>(begin, end);
      }
    }
    template <Lanes kWhich>
    FR_INLINE void finish_rows(int64_t begin, int64_t end) const {
      for (int64_t row = begin; row < end; ++row) {
        const float* from = sums + row * width;
        float* to = y + row * k;
        for (int64_t j = 0; j < count; j += kLanes) {
          cpu::finish<AllSteps<Residual::kNone>, kLanes, kWhich>(
              load<kLanes>(from + j), load<kLanes>(scale + j), load<kLanes>(shift + j), bounds,
              static_cast<const float*>(nullptr), to + j, count - j);
        }
      }
    }
  };

  // kRowTiles x kPanels: a group of 32 pixels and one panel, or of 16 pixels and two. The group before is
  // finished meanwhile.
  template <int kRowTiles, int kPanels, class Meanwhile>
  FR_INLINE void multiply(const BFloat16* x, int64_t q, int64_t panel, float* y, Meanwhile&& meanwhile) {
    constexpr int kColTiles = 2 * kPanels, kSums = kRowTiles * kColTiles;
    constexpr int kA = 4, kB = kA + kRowTiles, kBTiles = 8 - kB;
    constexpr int64_t kWidth = kPanels * kPanel;
    const int64_t steps = steps_of(shape_), pixel = shape_.stride_w * shape_.r * shape_.c,
                  part = layout_.part;
    const int64_t u_panel = steps * kStepValues;
    const BFloat16* u = reinterpret_cast<const BFloat16*>(problem_.weights) + panel * u_panel;
    const Pending before = before_;
    const int64_t rows_at_once = ceil_div(before.pixels, steps * kProductsOfStep);
    int64_t row = 0;
    unroll<kSums>([&](auto i) FR_LAMBDA { tiles_.template zero<decltype(i)::value>(); });
    for (int64_t step = 0; step < steps; ++step, u += kStepValues) {
      const BFloat16* v = x + offset_of_step(shape_, step);
      unroll<kProductsOfStep>([&](auto i) FR_LAMBDA {
        constexpr int kIndex = decltype(i)::value;
        constexpr int kBefore = kIndex > 0 ? kIndex - 1 : 0;
        constexpr int kXPart = kOrder[kIndex].x, kWPart = kOrder[kIndex].w;
        if constexpr (kIndex == 0 || kXPart != kOrder[kBefore].x) {
          unroll<kRowTiles>([&](auto tile) FR_LAMBDA {
            constexpr int kTile = decltype(tile)::value;
            tiles_.template load<kA + kTile>(v + kXPart * part + kTile * kTileRows * pixel,
                                             pixel * int64_t(sizeof(BFloat16)));
          });
        }
        unroll<kColTiles>([&](auto col) FR_LAMBDA {
          constexpr int kCol = decltype(col)::value;
          // Four tiles of weights do not all stay.
          if constexpr (kColTiles > kBTiles || kIndex == 0 || kWPart != kOrder[kBefore].w) {
            tiles_.template load<kB + kCol % kBTiles>(
                u + kCol / 2 * u_panel + (kWPart * 2 + kCol % 2) * kTileValues, 64);
          }
          unroll<kRowTiles>([&](auto tile) FR_LAMBDA {
            constexpr int kTile = decltype(tile)::value;
            tiles_.template multiply<kTile * kColTiles + kCol, kA + kTile, kB + kCol % kBTiles>();
          });
        });
        before.finish(row, row + rows_at_once);
        row += rows_at_once;
      });
      meanwhile();
    }
    float* sums = sums_ + parity_ * kGroup * kPanel;
    parity_ = 1 - parity_;
    unroll<kSums>([&](auto i) FR_LAMBDA {
      constexpr int kSum = decltype(i)::value;
      tiles_.template store<kSum>(sums + kSum / kColTiles * kTileRows * kWidth + kSum % kColTiles * kTileCols,
                                  kWidth * int64_t(sizeof(float)));
    });
    const int64_t k = panel * kPanel;
    before_ = {sums,
               kWidth,
               std::min<int64_t>(kRowTiles * kTileRows, shape_.q - q),
               std::min(shape_.k - k, kWidth),
               shape_.k,
               problem_.scale + k,
               problem_.shift + k,
               bounds_,
               y + q * shape_.k + k};
  }

  const ConvProblem& problem_;
  const ConvShape& shape_;
  const Layout layout_;
  const Bounds bounds_;
  const float* const x_;
  const int64_t first_top_;
  float* const sums_;  // of two groups
  BFloat16* const block_;
  BFloat16* const window_;

  // The window has the rows before rows_begin_, and of those up to rows_end_ the blocks before next_block_.
  int64_t rows_begin_ = 0, rows_end_ = INT64_MIN, next_row_ = 0, next_block_ = 0;
  int64_t parity_ = 0;
  Pending before_ = {};
  Tiles tiles_;
};

}  // namespace fused_resnet::cpu
