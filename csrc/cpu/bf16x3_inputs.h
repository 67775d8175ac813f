// The inputs of a block of positions (bf16x3_geometry.h) in three parts: X [phase][C /
// 32][part][position][32].
#pragma once

#include <algorithm>

#include "bf16x3.h"
#include "bf16x3_geometry.h"
#include "tiles.h"

namespace fused_resnet::cpu {

// Sizes in values. The parts of one position start in different sets of the cache.
struct Bf16x3Layout {
  int64_t part, chunk, phase, values;
  Bf16x3Layout(const ConvShape& shape, const Bf16x3Geometry& geometry, int64_t positions) {
    constexpr int64_t kSets = 64, kSkew = 21;
    const int64_t needed = positions + geometry.largest_shift();
    part = (ceil_div(needed - kSkew, kSets) * kSets + kSkew) * kTileDepth;
    chunk = kParts * part;
    phase = ceil_div(shape.c, kTileDepth) * chunk;
    values = geometry.phases() * phase;
  }

  // Where each step finds its inputs, relative to those of the first position: taps within 32 channels.
  void find_steps(const ConvShape& shape, const Bf16x3Geometry& geometry, int64_t* steps) const {
    for (int64_t c = 0; c * kTileDepth < shape.c; ++c) {
      for (int64_t r = 0; r < shape.r; ++r) {
        for (int64_t s = 0; s < shape.s; ++s) {
          const int64_t of_phase = geometry.h.phase(r) * geometry.w.phases + geometry.w.phase(s);
          *steps++ = of_phase * phase + c * chunk + geometry.shift(r, s) * kTileDepth;
        }
      }
    }
  }
};

// Converts the inputs of one position after another.
template <int kLanes>
class Bf16x3Inputs {
 public:
  Bf16x3Inputs(const ConvProblem& problem, const Bf16x3Geometry& geometry, const Bf16x3Layout& layout,
               int64_t first, int64_t positions, BFloat16* x)
      : problem_(problem),
        geometry_(geometry),
        layout_(layout),
        at_(geometry, first),
        left_(positions),
        x_(x),
        padded_(ceil_div(problem.shape.c, kTileDepth) * kTileDepth) {}

  void advance(int64_t positions) {
    for (positions = std::min(positions, left_), left_ -= positions; positions > 0; --positions) {
      BFloat16* to = x_;
      for (int64_t h = 0; h < geometry_.h.phases; ++h) {
        for (int64_t w = 0; w < geometry_.w.phases; ++w, to += layout_.phase) {
          convert_pixel(geometry_.h.input(at_.i, h), geometry_.w.input(at_.j, w), to);
        }
      }
      x_ += kTileDepth;
      at_.step();
    }
  }

 private:
  void convert_pixel(int64_t h, int64_t w, BFloat16* to) const {
    if (at_.n >= geometry_.n || h < 0 || h >= geometry_.h.size || w < 0 || w >= geometry_.w.size) {
      for (int64_t c = 0; c < padded_; c += kTileDepth, to += layout_.chunk) {
        for (int part = 0; part < kParts; ++part) std::memset(to + part * layout_.part, 0, 64);
      }
      return;
    }
    const float* from = problem_.input<float>() + at_.n * problem_.x_stride[0] + h * problem_.x_stride[1] +
                        w * problem_.x_stride[2];
    const int64_t c_count = problem_.shape.c;
    int64_t c = 0;
    for (; c + kTileDepth <= c_count; c += kTileDepth, to += layout_.chunk) convert_chunk(from + c, to);
    if (c < padded_) {
      float rest[kTileDepth] = {};
      for (int64_t i = c; i < c_count; ++i) rest[i - c] = from[i];
      convert_chunk(rest, to);
    }
  }
  FR_INLINE void convert_chunk(const float* from, BFloat16* to) const {
    for (int64_t i = 0; i < kTileDepth; i += 2 * kLanes) {
      store_bf16x3<kLanes>(load<kLanes>(from + i), load<kLanes>(from + i + kLanes), to + i, layout_.part);
    }
  }

  const ConvProblem& problem_;
  const Bf16x3Geometry& geometry_;
  const Bf16x3Layout& layout_;
  Position at_;
  int64_t left_;
  BFloat16* x_;
  int64_t padded_;
};

}  // namespace fused_resnet::cpu
