// How a kernel of the Hopper family becomes an entry point that the driver finds by its plain name.
#pragma once

#include "wgmma_gemm.cuh"

#define FUSED_RESNET_DEFINE_WGMMA_KERNEL(symbol, tile, math, load, epilogue)                              \
  extern "C" __global__ void __launch_bounds__(fused_resnet::tile::kThreads, fused_resnet::tile::kBlocks) \
      symbol(const __grid_constant__ fused_resnet::ConvParams params,                                     \
             const __grid_constant__ fused_resnet::TensorMap x,                                           \
             const __grid_constant__ fused_resnet::TensorMap weight,                                      \
             const __grid_constant__ fused_resnet::TensorMap proj_x,                                      \
             const __grid_constant__ fused_resnet::TensorMap proj_weight) {                               \
    fused_resnet::wgmma_entry<fused_resnet::tile, fused_resnet::math>(params, x, weight, proj_x,          \
                                                                      proj_weight);                       \
  }
