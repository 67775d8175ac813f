// The weights of convolution on matrix tiles, in steps: 32 channels of one tap for a panel of 32 outputs.
//
//   U [panel][step][part][2][16][16][2]    bfloat16, B tiles in three parts
//   W [panel][2][step][16][16][2]          float32: fresh weights, taken apart in the call. Half a panel lies
//   in
//                                          one piece: few positions read them from memory so, and take 6 %
//                                          longer where there are gaps
#pragma once

#include <algorithm>

#include "bf16x3.h"
#include "gemm.h"
#include "tiles.h"

namespace fused_resnet::cpu {

template <int kLanes>
struct Bf16x3Weights {
  static constexpr int64_t kPanel = 2 * kTileCols;  // output channels
  static constexpr int64_t kTileValues = kTileRows * kTileDepth;
  static constexpr int64_t kStepWeights = 2 * kTileValues;
  static constexpr int64_t kStepValues = kParts * kStepWeights;  // of U
  static constexpr int64_t kUnit = 2 * kLanes;                   // weights converted at once
  static constexpr int64_t kUnits = kStepWeights / kUnit;        // of a step
  static constexpr int64_t kTileUnits = kTileValues / kUnit;     // of one of its two tiles

  static int64_t chunks_of(const ConvShape& shape) { return ceil_div(shape.c, kTileDepth); }
  static int64_t steps_of(const ConvShape& shape) { return chunks_of(shape) * shape.r * shape.s; }

  static FR_INLINE void convert_unit(const float* from, BFloat16* to, int64_t part_stride) {
    store_bf16x3<kLanes>(load<kLanes>(from), load<kLanes>(from + kLanes), to, part_stride);
  }
  static FR_INLINE void fetch_units(const float* from, int64_t count) {
    for (int64_t i = 0; i < count * kUnit; i += kCacheLine) __builtin_prefetch(from + i, 0, 2);
  }

  // Converts steps of W to U, some units with each call. `half`: floats between the two tiles of a step.
  struct Converter {
    const float* from;
    int64_t half;
    BFloat16* to;
    int64_t unit, units;
    FR_INLINE void advance(int64_t count) {
      constexpr int64_t kFar = 1024;  // floats: further than the processor looks ahead by itself
      for (const int64_t end = std::min(unit + count, units); unit < end; ++unit) {
        const int64_t step = unit / kUnits, of_step = unit % kUnits;
        const float* at =
            from + of_step / kTileUnits * half + step * kTileValues + of_step % kTileUnits * kUnit;
        fetch_units(at + kFar, 1);
        convert_unit(at, to + step * kStepValues + of_step * kUnit, kStepWeights);
      }
    }
  };

  // Units [first, last) of one tile.
  static FR_INLINE void convert_tile(const float* from, int64_t first, int64_t last, BFloat16* to) {
    for (int64_t unit = first; unit < last; ++unit) {
      convert_unit(from + unit * kUnit, to + unit * kUnit, kTileValues);
    }
  }

  // Fetches U, some cache lines with each call.
  struct Fetcher {
    const BFloat16* at;
    FR_INLINE void advance(int64_t lines) {
      for (; lines > 0; --lines, at += kTileDepth) __builtin_prefetch(at, 0, 2);
    }
  };

  static void pack_panel(const ConvShape& shape, const float* weight, const int64_t stride[4],
                         int64_t k_count, bool fresh, float* out) {
    alignas(64) float whole[kStepWeights];
    const int64_t half = fresh ? steps_of(shape) * kTileValues : kTileValues;
    for (int64_t chunk = 0; chunk < chunks_of(shape); ++chunk) {
      const int64_t c_count = std::min<int64_t>(shape.c - chunk * kTileDepth, kTileDepth);
      for (int64_t tap = 0; tap < shape.r * shape.s; ++tap) {
        float* values = fresh ? out : whole;
        for (int64_t col = 0; col < 2; ++col) std::fill_n(values + col * half, kTileValues, 0.0f);
        const float* from =
            weight + chunk * kTileDepth * stride[1] + tap / shape.s * stride[2] + tap % shape.s * stride[3];
        for (int64_t k = 0; k < k_count; ++k) {
          float* to = values + k / kTileCols * half + k % kTileCols * 2;
          for (int64_t c = 0; c < c_count; ++c) {
            to[c / 2 * kTileDepth + c % 2] = from[k * stride[0] + c * stride[1]];
          }
        }
        if (!fresh) Converter{values, half, reinterpret_cast<BFloat16*>(out), 0, kUnits}.advance(kUnits);
        out += fresh ? kTileValues : kStepValues / 2;
      }
    }
  }
};

}  // namespace fused_resnet::cpu
