// The list of kernels in tiles.h as the planner reads it.
#include "plan.h"

namespace fused_resnet {
namespace {

template <class Tile, Math kMath, Load kLoad>
constexpr int turing_shared_bytes() {
  return kRunsOnTuring<Tile, kMath> ? OneStage<Tile>::template kSharedBytes<kLoad> : 0;
}

#define FUSED_RESNET_ENTRY(turing_bytes, projection, symbol, tile, math, load, epilogue) \
  {#symbol,       tile::kM,         tile::kN,      tile::kDepthBytes,                    \
   tile::kStages, tile::kThreads,   tile::kBlocks, tile::kSharedBytes<load>,             \
   turing_bytes,  tile::kParkBytes, projection,    math,                                 \
   load,          epilogue},
#define FUSED_RESNET_KERNEL_INFO(symbol, tile, math, load, epilogue) \
  FUSED_RESNET_ENTRY((turing_shared_bytes<tile, math, load>()), 1, symbol, tile, math, load, epilogue)
// The Hopper family has no code for Turing, and not all of its tiles have registers for a second sum.
#define FUSED_RESNET_WGMMA_KERNEL_INFO(symbol, tile, ...) \
  FUSED_RESNET_ENTRY(0, tile::kProjection, symbol, tile, __VA_ARGS__)
constexpr KernelInfo kCatalogue[] = {FUSED_RESNET_KERNELS(FUSED_RESNET_KERNEL_INFO)
                                         FUSED_RESNET_WGMMA_KERNELS(FUSED_RESNET_WGMMA_KERNEL_INFO)};
#undef FUSED_RESNET_KERNEL_INFO
#undef FUSED_RESNET_WGMMA_KERNEL_INFO
#undef FUSED_RESNET_ENTRY

}  // namespace

int kernel_count() {
  return static_cast<int>(sizeof(kCatalogue) / sizeof(kCatalogue[0]));
}
const KernelInfo& kernel_info(int index) {
  return kCatalogue[index];
}

}  // namespace fused_resnet
