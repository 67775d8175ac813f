// How a kernel of the list in tiles.h becomes an entry point that the driver finds by its plain name.
#pragma once

#include "implicit_gemm.cuh"

#define FUSED_RESNET_DEFINE_KERNEL(symbol, tile, math, load, epilogue)                                    \
  extern "C" __global__ void __launch_bounds__(                                                           \
      fused_resnet::tile::kThreads, fused_resnet::least_blocks<fused_resnet::tile, fused_resnet::math>()) \
      symbol(const __grid_constant__ fused_resnet::ConvParams params) {                                   \
    fused_resnet::conv_entry<fused_resnet::tile, fused_resnet::math, fused_resnet::load,                  \
                             fused_resnet::epilogue>(params);                                             \
  }
