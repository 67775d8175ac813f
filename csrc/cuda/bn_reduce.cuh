// The reductions over N, H, W: bn_stats (forward) and bn_backward_reduce. Phases:
//   1 accumulate  each thread takes every slots-th row of its part, kRows rows at a time
//   2 merge       the block's threads, in shared memory; the result is published in the workspace
//   3 finish      the last block of a column merges the parts in their order (moments.cuh)
// The grid, so the order of every addition, depends on the shape and the device alone: the same bits in every
// run.
#pragma once

#include "../bn_params.h"
#include "bn_kernels.h"
#include "moments.cuh"
#include "numbers.cuh"

namespace fused_resnet {

// This block's column and part, and this thread's place in it.
template <int kPacket>
struct Part {
  static constexpr int kPitch = bn_pitch(kPacket), kPlaneBytes = bn_plane_bytes(kPacket);

  Slots slots;
  int column, part, width, channel0, channel;
  bool reads;     // whether this thread has rows to read
  int64_t rows;   // of this part
  int64_t mine;   // rows of this thread
  int64_t index;  // of this thread's first packet, in elements
  int64_t step;   // elements from one of its rows to the next

  __device__ __forceinline__ explicit Part(const BnParams& params) : slots(params.lanes, kBnThreads) {
    column = static_cast<int>(blockIdx.x / params.parts);
    part = static_cast<int>(blockIdx.x) - column * params.parts;
    width = params.lanes * kPacket;
    channel0 = column * width;
    const int slot = static_cast<int>(threadIdx.x) / params.lanes;
    channel = channel0 + (static_cast<int>(threadIdx.x) - slot * params.lanes) * kPacket;
    const int64_t begin = part * params.rows_per_part;
    rows = rows_of(params, part);
    reads = slot < slots.slots && channel < params.channels;
    mine = reads && slot < rows ? (rows - slot + slots.slots - 1) / slots.slots : 0;
    index = (begin + slot) * params.channels + channel;
    step = int64_t{slots.slots} * params.channels;
  }
  __device__ __forceinline__ static int64_t rows_of(const BnParams& params, int part) {
    const int64_t left = params.rows - part * params.rows_per_part;
    return left < params.rows_per_part ? left : params.rows_per_part;
  }

  // The partial results of `which` part of this column.
  template <int kPlanes>
  __device__ __forceinline__ char* partial(const BnParams& params, int which) const {
    const int64_t at = (int64_t{column} * params.parts + which) * (kPlanes * kPitch * 4);
    return static_cast<char*>(params.workspace) + params.partials_offset + at;
  }
};

// ---- statistics ----

// Adds the next kRows rows: their own mean, M2 around it, then one merge.
template <int kPacket, int32_t kDType, int kRows>
__device__ __forceinline__ void add_rows_of(const BnParams& params, Part<kPacket>& at,
                                            const float (&pivot)[kPacket], Moments<kPacket>& m) {
  const int dtype = kDType == kAnyDType ? params.branch[0].dtype : kDType;
  Words4 y[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    y[r] = load_packet<kPacket>(params.branch[0].y, at.index, dtype);
    at.index += at.step;
  }
  const float total = add_rn(m.count, kRows), share = div_rn(kRows, total), cross = mul_rn(m.count, share);
#pragma unroll
  for (int i = 0; i < kPacket; ++i) {
    float v[kRows], sum = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      v[r] = add_rn(unpack<kPacket>(y[r], i, dtype), -pivot[i]);
      sum = r == 0 ? v[r] : add_rn(sum, v[r]);
    }
    const float mean = mul_rn(sum, 1.0f / kRows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) m2 = fma_rn(add_rn(v[r], -mean), add_rn(v[r], -mean), m2);
    merge_moments(m.mean[i], m.m2[i], mean, m2, share, cross);
  }
  m.count = total;
}

// Mean and biased variance of every channel.
template <int kPacket, int32_t kDType, int kBranches>
__device__ __forceinline__ void bn_stats(const BnParams& params) {
  constexpr int kPlaneBytes = Part<kPacket>::kPlaneBytes, kPitch = Part<kPacket>::kPitch;
  const uint32_t plane = shared_base(), flag = plane + 2 * kPlaneBytes;
  const int dtype = kDType == kAnyDType ? params.branch[0].dtype : kDType;
  Part<kPacket> part(params);

  // All is relative to the first pixel: with mean >> std, differences keep the digits that sums would lose.
  float pivot[kPacket];
  Words4 first = {};
  if (part.reads) first = load_packet<kPacket>(params.branch[0].y, part.channel, dtype);
#pragma unroll
  for (int i = 0; i < kPacket; ++i) pivot[i] = unpack<kPacket>(first, i, dtype);
  Moments<kPacket> moments;
  moments.clear();
  int64_t left = part.mine;
#pragma unroll 1
  for (; left >= kRowsUnderWay; left -= kRowsUnderWay) {
    add_rows_of<kPacket, kDType, kRowsUnderWay>(params, part, pivot, moments);
  }
#pragma unroll 1
  for (; left > 0; --left) add_rows_of<kPacket, kDType, 1>(params, part, pivot, moments);
  enter_epilogue();
  merge_slots<kBnThreads>(moments, static_cast<float>(part.rows), plane, kPlaneBytes, part.slots);
  publish<2>(part.template partial<2>(params, part.part), kPitch, part.width, plane, kPlaneBytes);
  if (!last_to_arrive(static_cast<uint32_t*>(params.workspace) + part.column, params.parts, flag)) return;

  const float rows = static_cast<float>(params.rows);
  merge_parts<kBnThreads>(
      part.template partial<2>(params, 0), 2 * kPitch * 4, kPitch, 0, params.parts,
      [&](int i) { return static_cast<float>(Part<kPacket>::rows_of(params, i)); }, rows, part.width, plane,
      kPlaneBytes);
  const int c = part.channel0 + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) >= part.width || c >= params.channels) return;
  const float mean = div_rn(shared_load_f32(plane + threadIdx.x * 4), rows);
  const float m2 = shared_load_f32(plane + kPlaneBytes + threadIdx.x * 4);
  const float around = load_number(params.branch[0].y, c, dtype);
  global_store_u32(params.result[0] + c, bits_of(add_rn(around, mean)));
  global_store_u32(params.result[1] + c, bits_of(div_rn(m2, rows)));
}

// ---- backward ----

// Adds the next kRows rows to sum[0] (dz), sum[1] (dz * (y - mean)) and, with a projection, sum[2].
template <int kPacket, int32_t kDType, int kBranches, int kRows>
__device__ __forceinline__ void add_gradients_of(const BnParams& params, Part<kPacket>& at,
                                                 const float (&mean)[kBranches][kPacket],
                                                 float (&sum)[kBranches + 1][kPacket]) {
  const bool any = kDType == kAnyDType;
  const int grad_dtype = any ? params.out_dtype : kDType;
  Words4 grad[kRows], y[kBranches][kRows];
  uint32_t bits[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // A packet's bits lie in one word: its first element's index is a multiple of kPacket.
    bits[r] = ~0u;
    if (params.mask != nullptr)
      bits[r] = global_load_u32(params.mask + (static_cast<uint64_t>(at.index) >> 5)) >> (at.index & 31);
    grad[r] = load_packet<kPacket>(params.grad_out, at.index, grad_dtype);
#pragma unroll
    for (int j = 0; j < kBranches; ++j) {
      y[j][r] = {};
      if (j < params.branches) {
        y[j][r] = load_packet<kPacket>(params.branch[j].y, at.index, any ? params.branch[j].dtype : kDType);
      }
    }
    at.index += at.step;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      const float dz = bits[r] >> i & 1 ? unpack<kPacket>(grad[r], i, grad_dtype) : 0.0f;
      sum[0][i] = add_rn(sum[0][i], dz);
#pragma unroll
      for (int j = 0; j < kBranches; ++j) {
        const float v = unpack<kPacket>(y[j][r], i, any ? params.branch[j].dtype : kDType);
        sum[j + 1][i] = fma_rn(dz, add_rn(v, -mean[j][i]), sum[j + 1][i]);
      }
    }
  }
}

// sum(dz), sum(dz * xhat) and, with a projection, the sum of dz * xhat of its BN.
template <int kPacket, int32_t kDType, int kBranches>
__device__ __forceinline__ void bn_backward_reduce(const BnParams& params) {
  constexpr int kSums = kBranches + 1;
  constexpr int kPlaneBytes = Part<kPacket>::kPlaneBytes, kPitch = Part<kPacket>::kPitch;
  const uint32_t plane = shared_base(), flag = plane + kSums * kPlaneBytes;
  Part<kPacket> part(params);
  float mean[kBranches][kPacket], sum[kSums][kPacket];
#pragma unroll
  for (int j = 0; j < kBranches; ++j) {
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      mean[j][i] = 0.0f;
      if (part.reads && j < params.branches) {
        mean[j][i] = float_of(global_load_u32(params.branch[j].mean + part.channel + i));
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kPacket; ++i) sum[s][i] = 0.0f;
  }
  constexpr int kRows = kBranches == 2 ? kRowsUnderWay / 2 : kRowsUnderWay;
  int64_t left = part.mine;
#pragma unroll 1
  for (; left >= kRows; left -= kRows) {
    add_gradients_of<kPacket, kDType, kBranches, kRows>(params, part, mean, sum);
  }
#pragma unroll 1
  for (; left > 0; --left) add_gradients_of<kPacket, kDType, kBranches, 1>(params, part, mean, sum);
  enter_epilogue();
#pragma unroll
  for (int s = 0; s < kSums; ++s) put<kPacket>(plane + s * kPlaneBytes, part.slots, sum[s]);
  add_slots<kBnThreads, kSums>(plane, kPlaneBytes, part.slots, kPacket);
  char* const mine = part.template partial<kSums>(params, part.part);
  publish<kSums>(mine, kPitch, part.width, plane, kPlaneBytes);
  if (!last_to_arrive(static_cast<uint32_t*>(params.workspace) + part.column, params.parts, flag)) return;

  const Quads quads(part.width, kBnThreads);
  float total[kSums][4] = {};
#pragma unroll 1
  for (int i = quads.first(0, params.parts); i < params.parts; i += quads.slots.slots) {
    const char* const from = part.template partial<kSums>(params, i) + quads.quad * 16;
    Words4 v[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) v[s] = workspace_load_16(from + s * kPitch * 4);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int e = 0; e < 4; ++e) total[s][e] = add_rn(total[s][e], float_of(v[s].w[e]));
    }
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) put<4>(plane + s * kPlaneBytes, quads.slots, total[s]);
  add_slots<kBnThreads, kSums>(plane, kPlaneBytes, quads.slots, 4);
  const int c = part.channel0 + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) >= part.width || c >= params.channels) return;
  const uint32_t at = plane + threadIdx.x * 4;
  global_store_u32(params.result[0] + c, bits_of(shared_load_f32(at)));
#pragma unroll
  for (int j = 0; j < kBranches; ++j) {
    if (j >= params.branches) continue;
    const float invstd = float_of(global_load_u32(params.branch[j].invstd + c));
    const float v = mul_rn(shared_load_f32(at + (j + 1) * kPlaneBytes), invstd);
    global_store_u32(params.result[j + 1] + c, bits_of(v));
  }
}

}  // namespace fused_resnet
