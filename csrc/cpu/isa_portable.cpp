// Four lanes: SSE2 or NEON, or whatever the compiler makes of its vector extension.
#include "checksum_kernel.h"
#include "direct_kernel.h"
#include "epilogue_kernel.h"
#include "isa.h"
#include "pooled_kernel.h"
#include "split_kernel.h"
#include "split_rows.h"
#include "winograd_fresh.h"
#include "winograd_kernel.h"
#include "winograd_split.h"

namespace fused_resnet::cpu {
using Portable = RegisterBlock<4, 6, 2>;
const Kernels kKernelsPortable = {"portable",
                                  "portable",
                                  DirectImpl<Portable>::kernel(),
                                  WinogradImpl<Portable, Winograd<2>>::kernel(),
                                  WinogradImpl<Portable, Winograd<4>>::kernel(),
                                  FreshWinogradImpl<Portable, Winograd<2>>::kernel(),
                                  FreshWinogradImpl<Portable, Winograd<4>>::kernel(),
                                  PooledImpl<Portable>::kernel(),
                                  EpilogueImpl<Portable::kLanes>::kernel(),
                                  ChecksumImpl<Portable::kLanes>::run,
                                  SplitImpl<PlainTiles, 4, false>::kernel(),
                                  SplitImpl<PlainTiles, 4, true>::kernel(),
                                  SplitWinogradImpl<PlainTiles, 4, Winograd<2>>::kernel(),
                                  SplitWinogradImpl<PlainTiles, 4, Winograd<4>>::kernel(),
                                  PooledRows<SplitRows<PlainTiles, 4>>::kernel()};
}  // namespace fused_resnet::cpu
