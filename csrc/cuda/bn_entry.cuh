// How a kernel of the list in bn_kernels.h becomes an entry point that the driver finds by its plain name.
#pragma once

#include "bn_elementwise.cuh"
#include "bn_reduce.cuh"

namespace fused_resnet {

template <BnPass kPass, int kPacket, int32_t kDType, int kBranches>
__device__ __forceinline__ void bn_kernel(const BnParams& params) {
  if constexpr (kPass == BnPass::kStats) bn_stats<kPacket, kDType, kBranches>(params);
  if constexpr (kPass == BnPass::kApply) bn_apply<kPacket, kDType, kBranches>(params);
  if constexpr (kPass == BnPass::kBackwardReduce) bn_backward_reduce<kPacket, kDType, kBranches>(params);
  if constexpr (kPass == BnPass::kBackwardApply) bn_backward_apply<kPacket, kDType, kBranches>(params);
}

}  // namespace fused_resnet

#define FUSED_RESNET_DEFINE_BN_KERNEL(symbol, pass, packet, dtype, branches, blocks)                    \
  extern "C" __global__ void __launch_bounds__(fused_resnet::kBnThreads, blocks)                        \
      symbol(const __grid_constant__ fused_resnet::BnParams params) {                                   \
    fused_resnet::bn_kernel<fused_resnet::BnPass::pass, packet, fused_resnet::dtype, branches>(params); \
  }
