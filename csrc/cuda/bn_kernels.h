// The list of the training kernels. No Torch, no CUDA: kernels, launcher and planner all read this one list.
#pragma once

#include <cstdint>

#include "../conv_params.h"

namespace fused_resnet {

enum class BnPass : int32_t { kStats = 0, kApply = 1, kBackwardReduce = 2, kBackwardApply = 3 };

constexpr int kBnThreads = 256;
constexpr int32_t kAnyDType = -1;  // each activation has a type of its own, known at run time

// A packet is what a thread loads of one activation at a time: kPacket neighbouring numbers, 16 bytes where
// all activations of the call have one type.
//
// A reduction gives each block a column of the channels, narrow enough that the last block of a column has
// little to merge, wide enough that a row of it fills its sectors: 64 channels, or 32 one by one.
constexpr int bn_max_lanes(int packet) {
  return packet == 1 ? 32 : 64 / packet;
}
constexpr int bn_pitch(int packet) {  // numbers of a column, as partial results lie in memory
  return packet * bn_max_lanes(packet);
}
// Partial results: mean and M2; or sum(dz) and one sum of dz * xhat for each branch.
constexpr int bn_planes(BnPass pass, int branches) {
  return pass == BnPass::kStats ? 2 : branches + 1;
}
// Shared memory of a reduction: the planes, then the flag of the last block.
constexpr int bn_plane_bytes(int packet) {
  return kBnThreads * (packet > 4 ? packet : 4) * 4;
}
constexpr int kRowsUnderWay = 4;  // of a reduction, per thread

// X(symbol, pass, packet, dtype, branches, blocks): blocks is how many of them an SM is meant to hold; it
// bounds the registers.
#define FUSED_RESNET_BN_STATS_KERNELS(X)        \
  X(bn_stats_f16, kStats, 8, kFloat16, 1, 3)    \
  X(bn_stats_bf16, kStats, 8, kBFloat16, 1, 3)  \
  X(bn_stats_f32, kStats, 4, kFloat32, 1, 4)    \
  X(bn_stats_mixed, kStats, 4, kAnyDType, 1, 4) \
  X(bn_stats_any, kStats, 1, kAnyDType, 1, 4)

// One BN; BN and projection's BN; the same with mixed types; the same number by number (unaligned).
#define FUSED_RESNET_BN_PASS_KERNELS(X, prefix, pass, one, two) \
  X(prefix##_f16, pass, 8, kFloat16, 1, one)                    \
  X(prefix##_bf16, pass, 8, kBFloat16, 1, one)                  \
  X(prefix##_f32, pass, 4, kFloat32, 1, one)                    \
  X(prefix##_proj_f16, pass, 8, kFloat16, 2, two)               \
  X(prefix##_proj_bf16, pass, 8, kBFloat16, 2, two)             \
  X(prefix##_proj_f32, pass, 4, kFloat32, 2, two)               \
  X(prefix##_mixed, pass, 4, kAnyDType, 2, two)                 \
  X(prefix##_any, pass, 1, kAnyDType, 2, two)

#define FUSED_RESNET_BN_APPLY_KERNELS(X) FUSED_RESNET_BN_PASS_KERNELS(X, bn_apply, kApply, 4, 2)
#define FUSED_RESNET_BN_BACKWARD_REDUCE_KERNELS(X) \
  FUSED_RESNET_BN_PASS_KERNELS(X, bn_backward_reduce, kBackwardReduce, 2, 2)
#define FUSED_RESNET_BN_BACKWARD_APPLY_KERNELS(X) \
  FUSED_RESNET_BN_PASS_KERNELS(X, bn_backward_apply, kBackwardApply, 3, 2)

#define FUSED_RESNET_BN_KERNELS(X)           \
  FUSED_RESNET_BN_STATS_KERNELS(X)           \
  FUSED_RESNET_BN_APPLY_KERNELS(X)           \
  FUSED_RESNET_BN_BACKWARD_REDUCE_KERNELS(X) \
  FUSED_RESNET_BN_BACKWARD_APPLY_KERNELS(X)

}  // namespace fused_resnet
