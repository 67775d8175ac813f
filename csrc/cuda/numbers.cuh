// Numbers of the three activation types, one at a time and as packets of neighbours; and the activations.
//
// Where `dtype` is known at compile time, the choices below fold away; else they are the same for the whole
// launch.
#pragma once

#include "../conv_params.h"
#include "primitives.cuh"

namespace fused_resnet {

__device__ __forceinline__ float load_number(const void* base, int64_t index, int dtype) {
  if (dtype == kFloat32) return float_of(global_load_u32(static_cast<const uint32_t*>(base) + index));
  const uint16_t bits = global_load_u16(static_cast<const uint16_t*>(base) + index);
  return dtype == kFloat16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

// kCount neighbouring numbers, as they lie in memory: one access of up to 16 bytes.
template <int kCount>
__device__ __forceinline__ Words4 load_packet(const void* base, int64_t index, int dtype) {
  Words4 packet = {};
  if constexpr (kCount == 8) {  // only 16-bit types
    packet = global_load_16(static_cast<const uint16_t*>(base) + index);
  } else if constexpr (kCount == 4) {
    if (dtype == kFloat32) {
      packet = global_load_16(static_cast<const uint32_t*>(base) + index);
    } else {
      const Words2 half = global_load_8(static_cast<const uint16_t*>(base) + index);
      packet.w[0] = half.w[0];
      packet.w[1] = half.w[1];
    }
  } else {
    static_assert(kCount == 1, "8, 4 or 1 numbers");
    packet.w[0] = dtype == kFloat32 ? global_load_u32(static_cast<const uint32_t*>(base) + index)
                                    : global_load_u16(static_cast<const uint16_t*>(base) + index);
  }
  return packet;
}

template <int kCount>
__device__ __forceinline__ float unpack(const Words4& packet, int i, int dtype) {
  if (kCount < 8 && dtype == kFloat32) return float_of(packet.w[i % 4]);
  const uint16_t bits = static_cast<uint16_t>(packet.w[i / 2] >> (i % 2 * 16));
  return dtype == kFloat16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

__device__ __forceinline__ uint32_t pack16(float low, float high, int dtype) {
  return dtype == kFloat16 ? pack_f16x2(low, high) : pack_bf16x2(low, high);
}

// kCount numbers, each rounded once, as they lie in memory.
template <int kCount>
__device__ __forceinline__ Words4 pack_packet(const float (&v)[kCount], int dtype) {
  if constexpr (kCount == 8) {
    return {pack16(v[0], v[1], dtype), pack16(v[2], v[3], dtype), pack16(v[4], v[5], dtype),
            pack16(v[6], v[7], dtype)};
  } else if constexpr (kCount == 4) {
    if (dtype == kFloat32) return {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])};
    return {pack16(v[0], v[1], dtype), pack16(v[2], v[3], dtype), 0, 0};
  } else {
    return {dtype == kFloat32 ? bits_of(v[0]) : pack16(v[0], 0.0f, dtype), 0, 0, 0};
  }
}

template <int kCount>
__device__ __forceinline__ void store_packet(void* base, int64_t index, const Words4& packet, int dtype) {
  if constexpr (kCount == 8) {
    global_store_16(static_cast<uint16_t*>(base) + index, packet);
  } else if constexpr (kCount == 4) {
    if (dtype == kFloat32) {
      global_store_16(static_cast<uint32_t*>(base) + index, packet);
    } else {
      global_store_8(static_cast<uint16_t*>(base) + index, {packet.w[0], packet.w[1]});
    }
  } else if (dtype == kFloat32) {
    global_store_u32(static_cast<uint32_t*>(base) + index, packet.w[0]);
  } else {
    global_store_u16(static_cast<uint16_t*>(base) + index, static_cast<uint16_t>(packet.w[0]));
  }
}

// The first `count` numbers of a packet, one by one: the last packet of a tensor. Word and half are chosen by
// comparison, because an array with a variable index would lie in local memory.
template <int kCount>
__device__ __forceinline__ Words4 load_part(const void* base, int64_t index, int count, int dtype) {
  Words4 packet = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const bool wide = dtype == kFloat32;
    const uint32_t bits = wide ? global_load_u32(static_cast<const uint32_t*>(base) + index + i)
                               : global_load_u16(static_cast<const uint16_t*>(base) + index + i);
    const int word = wide ? i : i / 2, shift = wide ? 0 : i % 2 * 16;
#pragma unroll
    for (int w = 0; w < 4; ++w) packet.w[w] |= w == word ? bits << shift : 0;
  }
  return packet;
}
template <int kCount>
__device__ __forceinline__ void store_part(void* base, int64_t index, const Words4& packet, int count,
                                           int dtype) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const bool wide = dtype == kFloat32;
    const int word = wide ? i : i / 2, shift = wide ? 0 : i % 2 * 16;
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) bits |= w == word ? packet.w[w] >> shift : 0;
    if (wide) {
      global_store_u32(static_cast<uint32_t*>(base) + index + i, bits);
    } else {
      global_store_u16(static_cast<uint16_t*>(base) + index + i, static_cast<uint16_t>(bits));
    }
  }
}

// Comparisons with NaN are false, so NaN passes through, as in eager.
__device__ __forceinline__ float activate(float v, int activation) {
  if (activation != kActivationNone && v < 0.0f) v = 0.0f;
  if (activation == kActivationRelu6 && v > 6.0f) v = 6.0f;
  return v;
}

}  // namespace fused_resnet
