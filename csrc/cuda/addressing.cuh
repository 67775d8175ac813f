// Where things are: in a stage of shared memory, in the depth of the product, and in x.
//
// The depth is a number with the digits (r, s, c), c fastest: weights lie in memory just so, and x is found
// by adding r rows, s columns and c channels to the pixel's window. One step forward is an addition with two
// carries: no division in the main loop, whatever R, S and C are, and no work wasted where C is not a
// multiple of the step.
#pragma once

#include "../conv_params.h"
#include "primitives.cuh"
#include "tiles.h"

namespace fused_resnet {

// Within a stage, row i keeps its 16-byte chunk j at position j ^ swizzle(i), so that the eight rows of one
// ldmatrix (and the eight lanes that write them) meet all 32 banks once.
template <class Tile>
__device__ __forceinline__ uint32_t swizzle(uint32_t row) {
  static_assert(Tile::kDepthBytes == 128 || Tile::kDepthBytes == 64, "a row is 8 or 4 chunks of 16 bytes");
  return Tile::kDepthBytes == 128 ? row & 7 : (row >> 1) & 3;
}

// A place in the depth. `position` is ((r * S) + s) * C + c.
struct Cursor {
  int position, r, s, c;

  __device__ __forceinline__ void set(const ConvSource& source, int at) {
    position = at;
    const int tap = at / source.c;
    c = at - tap * source.c;
    r = tap / source.s;
    s = tap - r * source.s;
  }
};

// What Cursor::advance needs of the source, held in registers.
struct Stride {
  int step_r, step_s, step_c, size_s, size_c;

  __device__ __forceinline__ explicit Stride(const ConvSource& source)
      : step_r(source.step_r),
        step_s(source.step_s),
        step_c(source.step_c),
        size_s(source.s),
        size_c(source.c) {}

  __device__ __forceinline__ void advance(Cursor& at, int elements) const {
    at.position += elements;
    at.r += step_r;
    at.s += step_s;
    at.c += step_c;
    if (at.c >= size_c) {
      at.c -= size_c;
      ++at.s;
    }
    if (at.s >= size_s) {
      at.s -= size_s;
      ++at.r;
    }
  }
};

// Top left corner of a pixel's window in x; it may lie outside the image.
struct Window {
  int image, h, w;

  __device__ __forceinline__ Window(const ConvParams& params, const ConvSource& source, uint32_t pixel) {
    const uint32_t area = static_cast<uint32_t>(params.p) * params.q;
    const uint32_t n = pixel / area, rest = pixel - n * area;
    const uint32_t row = rest / params.q;
    image = n;
    h = static_cast<int>(row) * source.stride_h - source.padding_h;
    w = static_cast<int>(rest - row * params.q) * source.stride_w - source.padding_w;
  }

  __device__ __forceinline__ int64_t offset(const ConvSource& source) const {  // in elements
    return image * source.x_stride_n + h * source.x_stride_h + w * source.x_stride_w;
  }
};

}  // namespace fused_resnet
