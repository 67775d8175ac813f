// The tensor maps of a launch of the Hopper family (wgmma_gemm.cuh), planned without addresses. No Torch, no
// CUDA.
#pragma once

#include <cstdint>

#include "../conv_params.h"

namespace fused_resnet {

// What cuTensorMapEncodeTiled or cuTensorMapEncodeIm2col is told, dimensions innermost first. Beside it:
// interleave none, swizzle of 128 bytes, L2 promotion to 256 bytes, zeros outside of the tensor.
struct TensorMapPlan {
  int64_t dims[4];
  int64_t strides[3];  // bytes, of dims[1] and up
  int32_t slot;        // TensorSlot of the tensor
  int32_t rank;        // 0: the launch has no such map
  int32_t data_type;   // CUtensorMapDataType
  int32_t im2col;      // 1: of pixels; 0: tiled, of filters
  int32_t box[3];      // tiled: elements; im2col: channels of a pixel, pixels of a column
  int32_t element_strides[4];
  int32_t lower[2], upper[2];  // im2col: corners of the box that the filter's corner walks; W, H
  int32_t reserved;
};
static_assert(sizeof(TensorMapPlan) == 7 * 8 + 16 * 4, "no padding: plans are compared byte by byte");

// The maps of x, weight, proj_x, proj_weight: kernel parameters behind ConvParams, in this order.
constexpr int kMapCount = 4;

// CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion, without the driver's header.
constexpr int32_t kMapFloat16 = 6, kMapBFloat16 = 9, kMapSwizzle128 = 3, kMapPromotion256 = 3;

// Whether tensor maps can describe what `params` (all but the fields of the tile) reads, and the kernels can
// store what it wants: 16-bit types, channels and filters in packets of 8, and windows within what a map can
// say of them (strides up to 8, padding up to 128, filters that reach up to 255 pixels).
bool tensor_maps_take(const ConvParams& params, int32_t dtype, int64_t images);

// The maps for tiles of `tile_m` pixels by `tile_n` channels; those without a source are zero.
void fill_tensor_maps(const ConvParams& params, int32_t dtype, int64_t images, int tile_m, int tile_n,
                      TensorMapPlan (&maps)[kMapCount]);

// Steps of a source, one tap and 64 channels each.
int32_t tensor_map_steps(const ConvSource& source);

}  // namespace fused_resnet
