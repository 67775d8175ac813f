#include "wgmma_entry.cuh"

FUSED_RESNET_KERNELS_WGMMA_F16(FUSED_RESNET_DEFINE_WGMMA_KERNEL)

namespace fused_resnet {
extern const bool kHopperCode;
const bool kHopperCode = FUSED_RESNET_HOPPER;  // csrc/cuda_build.py
}  // namespace fused_resnet
