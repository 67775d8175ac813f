// Which tile, and how many blocks share one tile's sum.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fused_resnet {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Schedule {
  int kernel;  // index into the catalogue; -1: none is as forced and fits the device
  int splits;
};

struct Forced {  // 0: free
  int tile_m, tile_n, splits;
};

// What the problem leaves of the catalogue.
struct Candidates {
  Math math;
  Load load;  // of the mma.sync family
  Epilogue epilogue;
  bool mma, wgmma;  // families
};

// The fastest by a model of one SM; `params` needs all but the fields that depend on the tile. `residual`:
// one is read.
Schedule choose_schedule(const ConvParams& params, bool residual, const Candidates& candidates,
                         const DeviceProperties& device, const Forced& forced);

}  // namespace fused_resnet
