// The last block to arrive does what needs the results of all: no second launch, and no block ever waits.
#pragma once

#include "primitives.cuh"

namespace fused_resnet {

// Called by all threads after the block's global stores. True in the last of `blocks` blocks, which then sees
// what the others stored (read it with workspace_load_16); the counter is zero again for the next launch.
// `flag` is the address of a shared word.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t blocks, uint32_t flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t before = arrive(counter, blocks);
    shared_store_u32(flag, before + 1 == blocks ? 1u : 0u);
  }
  __syncthreads();
  return shared_load_u32(flag) != 0;
}

}  // namespace fused_resnet
