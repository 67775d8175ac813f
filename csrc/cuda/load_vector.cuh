// Copies of 16 bytes from global to shared memory: C and every address are multiples of 16 bytes. Either at
// once (issue), or in two halves through registers (fetch, put).
#pragma once

#include "../conv_params.h"
#include "addressing.cuh"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

// A thread copies the same 16 bytes of the step from several rows, so one cursor serves all of them.
template <class Tile, int kElementBytes>
class VectorLoad {
  static constexpr int kDepth = Tile::kDepthBytes / kElementBytes;
  static constexpr int kChunks = Tile::kDepthBytes / 16;
  static constexpr int kRowsPerPass = Tile::kThreads / kChunks;
  static constexpr int kPassesA = Tile::kM / kRowsPerPass, kPassesB = Tile::kN / kRowsPerPass;
  static_assert(kRowsPerPass % 8 == 0, "every pass of a thread has the same swizzle");
  static_assert(Tile::kM % kRowsPerPass == 0 && Tile::kN % kRowsPerPass == 0, "whole passes");

  // Bit r says that filter row r of this pixel lies outside the image, bit 16 + s the same of filter column s
  // (the planner sends larger filters to GatherLoad). Bit 31 is always set, all bits are where the pixel
  // itself is none.
  static constexpr uint32_t kColumnBit = 1u << 16, kNever = 1u << 31;

  const char* x_[kPassesA];
  const char* weight_[kPassesB];
  uint32_t halo_[kPassesA];
  Cursor cursor_;
  Stride stride_;
  int depth_, row_stride_, column_stride_;  // of x, per filter row and column, in elements
  uint32_t destination_;

  __device__ __forceinline__ static uint32_t halo(const ConvSource& source, const Window& window) {
    uint32_t bits = kNever;
#pragma unroll 1
    for (int r = 0; r < source.r; ++r) {
      const bool outside =
          static_cast<uint32_t>(window.h + r * source.dilation_h) >= static_cast<uint32_t>(source.h);
      bits |= outside ? 1u << r : 0u;
    }
#pragma unroll 1
    for (int s = 0; s < source.s; ++s) {
      const bool outside =
          static_cast<uint32_t>(window.w + s * source.dilation_w) >= static_cast<uint32_t>(source.w);
      bits |= outside ? kColumnBit << s : 0u;
    }
    return bits;
  }

 public:
  __device__ __forceinline__ VectorLoad(const ConvParams& params, const ConvSource& source, int pixel0,
                                        int channel0, int first_step, uint32_t /*rows*/)
      : stride_(source),
        depth_(source.depth),
        row_stride_(static_cast<int>(source.dilation_h * source.x_stride_h)),
        column_stride_(static_cast<int>(source.dilation_w * source.x_stride_w)) {
    const uint32_t chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
    destination_ = row * Tile::kDepthBytes + (chunk ^ swizzle<Tile>(row)) * 16;
    cursor_.set(source, first_step * kDepth + static_cast<int>(chunk) * (16 / kElementBytes));
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      const int pixel = pixel0 + static_cast<int>(row) + i * kRowsPerPass;
      const bool inside = pixel < params.pixels;
      const Window window(params, source, inside ? pixel : 0);
      x_[i] = static_cast<const char*>(source.x) + window.offset(source) * kElementBytes;
      halo_[i] = inside ? halo(source, window) : ~0u;
      keep(x_[i]);
    }
#pragma unroll
    for (int i = 0; i < kPassesB; ++i) {
      // Channels past the last one repeat it: their products are never stored.
      const int channel = channel0 + static_cast<int>(row) + i * kRowsPerPass;
      const int64_t k = channel < params.k ? channel : params.k - 1;
      weight_[i] = static_cast<const char*>(source.weight) + k * source.depth * kElementBytes;
      keep(weight_[i]);
    }
  }

 private:
  // Calls copy(its number, source, valid) for each copy of the next step, and moves on.
  template <class Copy>
  __device__ __forceinline__ void each_copy(Copy copy) {
    const bool inside = cursor_.position < depth_;
    const uint32_t tap = inside ? (1u << cursor_.r) | (kColumnBit << cursor_.s) : ~0u;
    const int offset = cursor_.r * row_stride_ + (cursor_.s * column_stride_ + cursor_.c);
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      copy(i, x_[i] + static_cast<int64_t>(offset) * kElementBytes, (halo_[i] & tap) == 0);
    }
#pragma unroll
    for (int i = 0; i < kPassesB; ++i) {
      copy(kPassesA + i, weight_[i] + static_cast<int64_t>(cursor_.position) * kElementBytes, inside);
    }
    stride_.advance(cursor_, kDepth);
  }

  // Where copy number i goes.
  __device__ __forceinline__ uint32_t place(uint32_t stage, int i) const {
    const int row = (i < kPassesA ? i : i - kPassesA) * kRowsPerPass;
    return stage + destination_ + (i < kPassesA ? 0 : Tile::kBytesA) + row * Tile::kDepthBytes;
  }

 public:
  // What a thread copies in one step.
  struct Step {
    Words4 copy[kPassesA + kPassesB];
  };

  __device__ __forceinline__ void issue(uint32_t stage) {
    each_copy([&](int i, const char* source, bool valid) { cp_async<16>(place(stage, i), source, valid); });
  }
  __device__ __forceinline__ void fetch(Step& step) {
    each_copy([&](int i, const char* source, bool valid) {
      step.copy[i] = valid ? global_load_16(source) : Words4{};
    });
  }
  __device__ __forceinline__ void put(const Step& step, uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kPassesA + kPassesB; ++i) shared_store_16(place(stage, i), step.copy[i]);
  }
};

}  // namespace fused_resnet
