// The elementwise passes: bn_apply (forward) and bn_backward_apply.
//
// Activations are taken as a line of packets. A thread's packets lie `stride` apart, a multiple of the number
// of packets after which channels and mask words both repeat: so a thread meets the same channels again and
// again, keeps their vectors in registers, and any number of channels is served by whole, aligned packets.
#pragma once

#include "../bn_params.h"
#include "bn_kernels.h"
#include "numbers.cuh"
#include "primitives.cuh"

namespace fused_resnet {

constexpr int kPacketsUnderWay = 2;  // of each activation, per thread

// One packet of a thread. kWhole: all its elements exist. `count` is how many do, 0 where the thread has
// none; in_mask whether it is part of a word of the mask.
template <int kPacket, bool kWhole>
struct Packet {
  int64_t index;  // of the first element
  int count;
  bool in_mask;

  __device__ __forceinline__ Packet(const BnParams& params, int64_t at, bool walks) {
    index = at * kPacket;
    if constexpr (kWhole) {
      count = walks ? kPacket : 0;
      in_mask = walks;
    } else {
      const int64_t left = params.elements - index;
      count = !walks || left <= 0 ? 0 : left < kPacket ? static_cast<int>(left) : kPacket;
      in_mask = walks && (index & ~int64_t{31}) < params.elements;
    }
  }
  __device__ __forceinline__ Words4 load(const void* base, int dtype) const {
    if (count == kPacket) return load_packet<kPacket>(base, index, dtype);
    if constexpr (!kWhole) return load_part<kPacket>(base, index, count, dtype);
    return {};
  }
  __device__ __forceinline__ void store(void* base, const float (&v)[kPacket], int dtype) const {
    const Words4 packet = pack_packet<kPacket>(v, dtype);
    if (count == kPacket) {
      store_packet<kPacket>(base, index, packet, dtype);
    } else if constexpr (!kWhole) {
      store_part<kPacket>(base, index, packet, count, dtype);
    }
  }

  // Bits of the mask, this packet's first one lowest. kWordLanes neighbouring lanes share a word: the walk
  // gives them neighbouring packets.
  static constexpr int kWordLanes = 32 / kPacket;
  __device__ __forceinline__ static int shift() {
    return static_cast<int>(threadIdx.x) % kWordLanes * kPacket;
  }
  __device__ __forceinline__ uint32_t load_bits(const uint32_t* mask) const {
    if (mask == nullptr || !in_mask) return ~0u;
    return global_load_u32(mask + (index >> 5)) >> shift();
  }
  // All lanes of the warp.
  __device__ __forceinline__ void store_bits(uint32_t* mask, uint32_t bits) const {
    if constexpr (!kWhole) bits &= (1u << count) - 1;  // elements that do not exist have zero bits
    bits <<= shift();
    if constexpr (kWordLanes > 1) bits |= shuffle_xor<1>(bits);
    if constexpr (kWordLanes > 2) bits |= shuffle_xor<2>(bits);
    if constexpr (kWordLanes > 4) bits |= shuffle_xor<4>(bits);
    if constexpr (kWordLanes > 8) bits |= shuffle_xor<8>(bits);
    if constexpr (kWordLanes > 16) bits |= shuffle_xor<16>(bits);
    if (in_mask && shift() == 0) global_store_u32(mask + (index >> 5), bits);
  }
};

// Calls body(packets) for all packets of this thread: kPacketsUnderWay at a time while those of the whole
// warp exist, then one by one. A warp goes on until its first lane has no more, so that lanes may exchange
// their bits.
template <int kPacket, class Body>
__device__ __forceinline__ void for_each_packet(const BnParams& params, Body body) {
  const int64_t thread = int64_t{blockIdx.x} * kBnThreads + threadIdx.x;
  const int64_t packets = (params.elements + 31) / 32 * (32 / kPacket);  // whole words of the mask
  const int64_t lane = threadIdx.x % 32;
  const bool walks = thread < params.stride;
  int64_t at = thread;
  const int64_t last_lane =
      (kPacketsUnderWay - 1) * params.stride + 32 - lane;  // behind its last packet of a turn
#pragma unroll 1
  for (; (at + last_lane) * kPacket <= params.elements; at += kPacketsUnderWay * params.stride) {
    using Whole = Packet<kPacket, true>;
    static_assert(kPacketsUnderWay == 2, "as many packets as below");
    const Whole packet[] = {Whole(params, at, walks), Whole(params, at + params.stride, walks)};
    body(packet);
  }
#pragma unroll 1
  for (; at - lane < packets; at += params.stride) {
    const Packet<kPacket, false> packet[] = {Packet<kPacket, false>(params, at, walks)};
    body(packet);
  }
}

// The channels of this thread's packets.
template <int kPacket>
struct Channels {
  int c[kPacket];

  __device__ __forceinline__ explicit Channels(const BnParams& params) {
    const int64_t first = (int64_t{blockIdx.x} * kBnThreads + threadIdx.x) * kPacket;
    int at = static_cast<int>(first % params.channels);
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      c[i] = at;
      at = at + 1 == params.channels ? 0 : at + 1;
    }
  }
};

__device__ __forceinline__ float vector_at(const float* vector, int channel, float absent) {
  return vector == nullptr ? absent : float_of(global_load_u32(vector + channel));
}

// ---- forward ----

// weight * invstd * (y - mean) + bias. The mean is subtracted first: where mean >> std, y * scale + shift
// would cancel.
template <int kPacket>
struct Normalise {
  float mean[kPacket], scale[kPacket], bias[kPacket];

  __device__ __forceinline__ Normalise(const BnBranch& bn, const Channels<kPacket>& channels) {
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      const int c = channels.c[i];
      mean[i] = vector_at(bn.mean, c, 0.0f);
      scale[i] = mul_rn(vector_at(bn.invstd, c, 1.0f), vector_at(bn.weight, c, 1.0f));
      bias[i] = vector_at(bn.bias, c, 0.0f);
    }
  }
  __device__ __forceinline__ float operator()(int i, float y) const {
    return fma_rn(add_rn(y, -mean[i]), scale[i], bias[i]);
  }
};

// The activation as bounds. NaN is "no bound": every comparison with it is false.
struct Bounds {
  float lower, upper;

  __device__ __forceinline__ explicit Bounds(int activation)
      : lower(activation == kActivationNone ? float_of(kNan) : 0.0f),
        upper(activation == kActivationRelu6 ? 6.0f : float_of(kNan)) {}
  // The activation of z; `passes` says whether its gradient does. A NaN z is kept and so is its gradient, as
  // in eager.
  __device__ __forceinline__ float operator()(float z, bool& passes) const {
    const bool below = z <= lower, above = z >= upper;
    passes = !(below || above);
    return below ? lower : above ? upper : z;
  }

 private:
  static constexpr uint32_t kNan = 0x7fc00000u;
};

// out = act(BN(y) + residual), or act(BN(y) + BN(proj_y)), and one bit per element: does the gradient pass?
template <int kPacket, int32_t kDType, int kBranches>
__device__ __forceinline__ void bn_apply(const BnParams& params) {
  const bool any = kDType == kAnyDType;
  const int y_dtype = any ? params.branch[0].dtype : kDType;
  const int out_dtype = any ? params.out_dtype : kDType;
  const bool projection = kBranches == 2 && params.branches == 2;
  const void* const second = projection ? params.branch[1].y : params.residual;
  const int second_dtype = any ? (projection ? params.branch[1].dtype : params.second_dtype) : kDType;

  const Channels<kPacket> channels(params);
  const Normalise<kPacket> main(params.branch[0], channels);
  const Normalise<kPacket> shortcut(params.branch[projection ? 1 : 0],
                                    channels);  // unused without projection
  const Bounds bounds(params.activation);
  for_each_packet<kPacket>(params, [&](const auto& packet) {
    constexpr int kCount = sizeof(packet) / sizeof(packet[0]);
    Words4 y[kCount], other[kCount];
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      y[b] = packet[b].load(params.branch[0].y, y_dtype);
      other[b] = {};
      if (second != nullptr) other[b] = packet[b].load(second, second_dtype);
    }
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      float z[kPacket];
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kPacket; ++i) {
        z[i] = main(i, unpack<kPacket>(y[b], i, y_dtype));
        if (second != nullptr) {
          const float v = unpack<kPacket>(other[b], i, second_dtype);
          z[i] = add_rn(z[i], projection ? shortcut(i, v) : v);
        }
        bool passes;
        z[i] = bounds(z[i], passes);
        bits |= passes ? 1u << i : 0u;
      }
      packet[b].store(params.out, z, out_dtype);
      if (params.mask != nullptr) packet[b].store_bits(params.mask, bits);
    }
  });
}

// ---- backward ----

// weight * invstd * (dz - mean(dz) - xhat * mean(dz * xhat)), multiplied out so that it is two multiply-adds.
template <int kPacket>
struct Through {
  float mean[kPacket], scale[kPacket], offset[kPacket], slope[kPacket];

  __device__ __forceinline__ Through(const BnBranch& bn, const Channels<kPacket>& channels) {
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      const int c = channels.c[i];
      const float invstd = vector_at(bn.invstd, c, 1.0f);
      mean[i] = vector_at(bn.mean, c, 0.0f);
      scale[i] = mul_rn(invstd, vector_at(bn.weight, c, 1.0f));
      offset[i] = mul_rn(-scale[i], vector_at(bn.mean_dz, c, 0.0f));
      slope[i] = mul_rn(-scale[i], mul_rn(invstd, vector_at(bn.mean_dz_xhat, c, 0.0f)));
    }
  }
  __device__ __forceinline__ float operator()(int i, float dz, float y) const {
    return fma_rn(scale[i], dz, fma_rn(add_rn(y, -mean[i]), slope[i], offset[i]));
  }
};

template <int kPacket, int32_t kDType, int kBranches>
__device__ __forceinline__ void bn_backward_apply(const BnParams& params) {
  const bool any = kDType == kAnyDType;
  const int y_dtype = any ? params.branch[0].dtype : kDType;
  const int grad_dtype = any ? params.out_dtype : kDType;
  const bool projection = kBranches == 2 && params.branches == 2;
  const int second_dtype = any ? (projection ? params.branch[1].dtype : params.second_dtype) : kDType;

  const Channels<kPacket> channels(params);
  const Through<kPacket> main(params.branch[0], channels);
  const Through<kPacket> shortcut(params.branch[projection ? 1 : 0], channels);  // unused without projection
  for_each_packet<kPacket>(params, [&](const auto& packet) {
    constexpr int kCount = sizeof(packet) / sizeof(packet[0]);
    Words4 grad[kCount], y[kCount], other[kCount];
    uint32_t bits[kCount];
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      bits[b] = packet[b].load_bits(params.mask);
      grad[b] = packet[b].load(params.grad_out, grad_dtype);
      y[b] = packet[b].load(params.branch[0].y, y_dtype);
      other[b] = {};
      if (projection) other[b] = packet[b].load(params.branch[1].y, second_dtype);
    }
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      float d_y[kPacket], d_second[kPacket];
#pragma unroll
      for (int i = 0; i < kPacket; ++i) {
        const float dz = bits[b] >> i & 1 ? unpack<kPacket>(grad[b], i, grad_dtype) : 0.0f;
        d_y[i] = main(i, dz, unpack<kPacket>(y[b], i, y_dtype));
        d_second[i] = projection ? shortcut(i, dz, unpack<kPacket>(other[b], i, second_dtype)) : dz;
      }
      packet[b].store(params.out, d_y, y_dtype);
      if (params.d_second != nullptr) packet[b].store(params.d_second, d_second, second_dtype);
    }
  });
}

}  // namespace fused_resnet
