#include "tensor_maps.h"

#include <cstring>

#include "plan.h"

namespace fused_resnet {
namespace {

constexpr int kStepChannels = 64;  // 128 bytes: the span of the swizzle

// The corners of an im2col map bound where the filter's corner may stand: from the padded image's first pixel
// to the last from which the whole filter fits. The map's limits for [N, H, W, C]: 8 bits signed.
int64_t lower_corner(int64_t padding) {
  return -padding;
}
int64_t upper_corner(int64_t padding, int64_t taps, int64_t dilation) {
  return padding - (taps - 1) * dilation;
}
bool fits_corner(int64_t corner) {
  return -128 <= corner && corner <= 127;
}

bool describes(const ConvSource& source, int64_t images) {
  constexpr int64_t kDimension = int64_t{1} << 32, kStrideBytes = int64_t{1} << 40;
  const int64_t reach_h = int64_t{source.r - 1} * source.dilation_h;
  const int64_t reach_w = int64_t{source.s - 1} * source.dilation_w;
  return source.vector_bytes == 16 && source.stride_h <= 8 && source.stride_w <= 8 && reach_h <= 255 &&
         reach_w <= 255 && fits_corner(lower_corner(source.padding_h)) &&
         fits_corner(lower_corner(source.padding_w)) &&
         fits_corner(upper_corner(source.padding_h, source.r, source.dilation_h)) &&
         fits_corner(upper_corner(source.padding_w, source.s, source.dilation_w)) && images < kDimension &&
         source.x_stride_n * 2 < kStrideBytes && int64_t{source.depth} * 2 < kStrideBytes;
}

TensorMapPlan map_of(const ConvSource& source, int32_t slot, int32_t dtype) {
  TensorMapPlan map;
  std::memset(&map, 0, sizeof(map));
  map.slot = slot;
  map.data_type = dtype == kFloat16 ? kMapFloat16 : kMapBFloat16;
  map.dims[0] = source.c;
  map.box[0] = kStepChannels;
  for (int32_t& stride : map.element_strides) stride = 1;
  return map;
}

TensorMapPlan map_of_pixels(const ConvSource& source, int32_t slot, int32_t dtype, int64_t images,
                            int tile_m) {
  TensorMapPlan map = map_of(source, slot, dtype);
  map.rank = 4;
  map.im2col = 1;
  map.dims[1] = source.w;
  map.dims[2] = source.h;
  map.dims[3] = images;
  map.strides[0] = source.x_stride_w * 2;
  map.strides[1] = source.x_stride_h * 2;
  map.strides[2] = source.x_stride_n * 2;
  map.box[1] = tile_m;
  map.element_strides[1] = source.stride_w;
  map.element_strides[2] = source.stride_h;
  map.lower[0] = static_cast<int32_t>(lower_corner(source.padding_w));
  map.lower[1] = static_cast<int32_t>(lower_corner(source.padding_h));
  map.upper[0] = static_cast<int32_t>(upper_corner(source.padding_w, source.s, source.dilation_w));
  map.upper[1] = static_cast<int32_t>(upper_corner(source.padding_h, source.r, source.dilation_h));
  return map;
}

TensorMapPlan map_of_filters(const ConvSource& source, int32_t slot, int32_t dtype, int32_t k, int tile_n) {
  TensorMapPlan map = map_of(source, slot, dtype);
  map.rank = 3;
  map.dims[1] = source.r * source.s;
  map.dims[2] = k;
  map.strides[0] = int64_t{source.c} * 2;
  map.strides[1] = int64_t{source.depth} * 2;
  map.box[1] = 1;
  map.box[2] = tile_n;
  return map;
}

}  // namespace

bool tensor_maps_take(const ConvParams& params, int32_t dtype, int64_t images) {
  if (dtype == kFloat32 || params.y_dtype != dtype || params.y_vector != 8) return false;
  for (int i = 0; i < params.sources; ++i) {
    if (!describes(params.source[i], images)) return false;
  }
  return true;
}

void fill_tensor_maps(const ConvParams& params, int32_t dtype, int64_t images, int tile_m, int tile_n,
                      TensorMapPlan (&maps)[kMapCount]) {
  maps[0] = map_of_pixels(params.source[0], kTensorX, dtype, images, tile_m);
  maps[1] = map_of_filters(params.source[0], kTensorWeight, dtype, params.k, tile_n);
  if (params.sources != 2) return;
  maps[2] = map_of_pixels(params.source[1], kTensorProjX, dtype, images, tile_m);
  maps[3] = map_of_filters(params.source[1], kTensorProjWeight, dtype, params.k, tile_n);
}

int32_t tensor_map_steps(const ConvSource& source) {
  return source.r * source.s * ((source.c + kStepChannels - 1) / kStepChannels);
}

}  // namespace fused_resnet
