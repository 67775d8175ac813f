// A tensor map (CUtensorMap) as kernels and launcher see it: opaque bytes, a kernel parameter of its own. No
// Torch, no CUDA.
#pragma once

namespace fused_resnet {

struct alignas(128) TensorMap {
  unsigned char bytes[128];
};

}  // namespace fused_resnet
