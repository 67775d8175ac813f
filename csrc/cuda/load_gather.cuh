// Copies of 8, 4 or 2 bytes (or 16) from global to shared memory: for any C, any alignment, any filter, any
// size.
//
// Slower than VectorLoad, and meant for what that cannot do: a stem with C = 3, odd channel counts, unaligned
// views, filters of more than 15 taps a side, images beyond 2^31 bytes.
#pragma once

#include "../conv_params.h"
#include "addressing.cuh"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

// A thread copies one piece of the step (`vector_bytes` wide) from as many rows as it takes. They are too
// many to keep in registers, so each pixel's window lies in shared memory: its address in x, and its corner
// (h, w).
template <class Tile, int kElementBytes>
class GatherLoad {
  static constexpr int kDepth = Tile::kDepthBytes / kElementBytes;
  static constexpr int kOutside = -(1 << 30);  // a corner whose every tap is outside the image

  const ConvSource& source_;
  const char* weight_;
  Cursor cursor_;
  Stride stride_;
  uint32_t rows_;            // shared address of the windows
  int row_, rows_per_pass_;  // this thread's rows are row_ + i * rows_per_pass_
  int byte_;                 // where in the step its piece begins
  int channel0_, channels_;

  template <int kBytes>
  __device__ __forceinline__ static void copy(uint32_t destination, const char* from, bool valid) {
    if constexpr (kBytes == 2) {  // cp.async copies no less than 4 bytes
      shared_store_u16(destination, valid ? global_load_u16(from) : uint16_t{0});
    } else if constexpr (kAmpere) {
      cp_async<kBytes>(destination, from, valid);
    } else if constexpr (kBytes == 4) {
      shared_store_u32(destination, valid ? global_load_u32(from) : uint32_t{0});
    } else if constexpr (kBytes == 8) {
      shared_store_8(destination, valid ? global_load_8(from) : Words2{});
    } else {
      shared_store_16(destination, valid ? global_load_16(from) : Words4{});
    }
  }

  __device__ __forceinline__ uint32_t place(int row) const {
    const uint32_t chunk = static_cast<uint32_t>(byte_) / 16 ^ swizzle<Tile>(row);
    return row * Tile::kDepthBytes + chunk * 16 + byte_ % 16;
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_rows(uint32_t stage) const {
    const bool inside = cursor_.position < source_.depth;
    const int dh = cursor_.r * source_.dilation_h, dw = cursor_.s * source_.dilation_w;
    const int64_t offset = (dh * source_.x_stride_h + dw * source_.x_stride_w + cursor_.c) * kElementBytes;
#pragma unroll 4
    for (int row = row_; row < Tile::kM; row += rows_per_pass_) {
      const Words4 window = shared_load_16(rows_ + row * Tile::kRowBytes);
      const int64_t corner = static_cast<int64_t>(static_cast<uint64_t>(window.w[1]) << 32 | window.w[0]);
      const int h = static_cast<int>(window.w[2]) + dh, w = static_cast<int>(window.w[3]) + dw;
      const bool valid = inside && static_cast<uint32_t>(h) < static_cast<uint32_t>(source_.h) &&
                         static_cast<uint32_t>(w) < static_cast<uint32_t>(source_.w);
      copy<kBytes>(stage + place(row), static_cast<const char*>(source_.x) + corner + offset, valid);
    }
#pragma unroll 4
    for (int row = row_; row < Tile::kN; row += rows_per_pass_) {
      const int64_t channel = channel0_ + row < channels_ ? channel0_ + row : channels_ - 1;
      const char* from = weight_ + (channel * source_.depth + cursor_.position) * kElementBytes;
      copy<kBytes>(stage + Tile::kBytesA + place(row), from, inside);
    }
  }

 public:
  __device__ __forceinline__ GatherLoad(const ConvParams& params, const ConvSource& source, int pixel0,
                                        int channel0, int first_step, uint32_t rows)
      : source_(source),
        weight_(static_cast<const char*>(source.weight)),
        stride_(source),
        rows_(rows),
        channel0_(channel0),
        channels_(params.k) {
    const int pieces = Tile::kDepthBytes / source.vector_bytes;  // a power of two, at most 64
    row_ = static_cast<int>(threadIdx.x) / pieces;
    rows_per_pass_ = Tile::kThreads / pieces;
    byte_ = static_cast<int>(threadIdx.x) % pieces * source.vector_bytes;
    cursor_.set(source, first_step * kDepth + byte_ / kElementBytes);
    for (int row = threadIdx.x; row < Tile::kM; row += Tile::kThreads) {
      const bool inside = pixel0 + row < params.pixels;
      const Window window(params, source, inside ? pixel0 + row : 0);
      const int64_t corner = window.offset(source) * kElementBytes;
      shared_store_16(rows + row * Tile::kRowBytes,
                      {static_cast<uint32_t>(corner), static_cast<uint32_t>(corner >> 32),
                       static_cast<uint32_t>(inside ? window.h : kOutside), static_cast<uint32_t>(window.w)});
    }
    __syncthreads();
  }

  __device__ __forceinline__ void issue(uint32_t stage) {
    switch (source_.vector_bytes) {
      case 16:
        copy_rows<16>(stage);
        break;
      case 8:
        copy_rows<8>(stage);
        break;
      case 4:
        copy_rows<4>(stage);
        break;
      default:
        if constexpr (kElementBytes == 2) copy_rows<2>(stage);
    }
    stride_.advance(cursor_, kDepth);
  }

  // Without asynchronous copies nothing is fetched ahead: the pieces are too many for registers.
  struct Step {};
  __device__ __forceinline__ void fetch(Step&) {}
  __device__ __forceinline__ void put(const Step&, uint32_t stage) { issue(stage); }
};

}  // namespace fused_resnet
