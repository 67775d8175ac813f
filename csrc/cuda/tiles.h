// The tile configurations, and the list of kernels built from them. No Torch, no CUDA: kernels, launcher and
// planner all read this one list.
#pragma once

namespace fused_resnet {

enum class Math : int { kFloat16 = 0, kBFloat16 = 1, kTensorFloat32 = 2, kFloat32 = 3 };
// How operands reach shared memory: 16-byte copies, narrower ones, or the Hopper family's tensor maps (TMA).
enum class Load : int { kVector = 0, kGather = 1, kTensorMap = 2 };
// What follows the product: the whole tail, or y as it is and its statistics.
enum class Epilogue : int { kTail = 0, kStatistics = 1 };

// One block computes kM pixels x kN channels with kWarpsM x kWarpsN warps. Per step it takes kDepthBytes of
// the depth from every row (so 16-bit types go twice as deep as 32-bit ones), through kStages buffers.
// kBlocks is how many blocks one SM is meant to hold; it bounds the registers.
template <int M, int N, int DepthBytes, int Stages, int WarpsM, int WarpsN, int Blocks>
struct Tile {
  static constexpr int kM = M, kN = N, kDepthBytes = DepthBytes, kStages = Stages;
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN, kBlocks = Blocks;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kBytesA = M * DepthBytes, kBytesB = N * DepthBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;

  // Dynamic shared memory, in this order; offsets in bytes.
  // The stages; after the main loop the epilogue's rows of fp32, at least 16 of each row of warps.
  static constexpr int kStagesBytes = Stages * kStageBytes, kStagingBytes = WarpsM * 16 * (N + 8) * 4;
  static constexpr int kPipelineBytes = kStagesBytes > kStagingBytes ? kStagesBytes : kStagingBytes;
  static constexpr int kNormOffset = kPipelineBytes;           // scale, shift of source 0, then of source 1
  static constexpr int kFlagOffset = kNormOffset + 4 * N * 4;  // split-K: did this block arrive last?
  static constexpr int kRowsOffset = kFlagOffset + 16;  // gather kernels: where each pixel's window begins
  static constexpr int kRowBytes = 16;
  template <Load kLoad>
  static constexpr int kSharedBytes = kRowsOffset + (kLoad == Load::kGather ? M * kRowBytes : 0);
  static constexpr int kParkBytes =
      M * N * 4;  // behind all others, where there is a projection (projection.cuh)
};

// The same on Turing (sm_75): 64 KiB of shared memory for all blocks of an SM, and copies that pass
// registers. One stage; the next step waits in registers, for which the two largest tiles have none left.
template <class T>
using OneStage = Tile<T::kM, T::kN, T::kDepthBytes, 1, T::kWarpsM, T::kWarpsN, T::kBlocks>;
template <class T, Math kMath>
constexpr bool kRunsOnTuring =
    T::kM * T::kN <= 128 * 64 && (kMath == Math::kFloat16 || kMath == Math::kFloat32);

// Statistics: so many tiles of a column are merged by one block, then the groups of them.
constexpr int kGroupTiles = 64;

// 64 x 64 per warp in the two largest: per product, a warp reads half the shared memory that 32 x 32 reads.
using Tile32x32 = Tile<32, 32, 128, 4, 2, 2, 4>;
using Tile64x64 = Tile<64, 64, 128, 3, 2, 2, 3>;
using Tile128x64 = Tile<128, 64, 64, 4, 2, 2, 3>;
using Tile64x128 = Tile<64, 128, 64, 4, 2, 2, 3>;
using Tile128x128 = Tile<128, 128, 64, 4, 2, 2, 2>;
using Tile256x128 = Tile<256, 128, 64, 4, 4, 2, 1>;
// fp32 on the FMA units, where a warp's lanes are 4 rows x 8 columns (warp_fma.cuh).
using TileFma128x64 = Tile<128, 64, 128, 3, 4, 1, 2>;

// X(symbol, tile, math, load, epilogue): every tile with 16-byte copies, and for any other alignment.
#define FUSED_RESNET_TILES(X, prefix, math, load)                           \
  X(prefix##_32x32, Tile32x32, Math::math, Load::load, Epilogue::kTail)     \
  X(prefix##_64x64, Tile64x64, Math::math, Load::load, Epilogue::kTail)     \
  X(prefix##_128x64, Tile128x64, Math::math, Load::load, Epilogue::kTail)   \
  X(prefix##_64x128, Tile64x128, Math::math, Load::load, Epilogue::kTail)   \
  X(prefix##_128x128, Tile128x128, Math::math, Load::load, Epilogue::kTail) \
  X(prefix##_256x128, Tile256x128, Math::math, Load::load, Epilogue::kTail)
#define FUSED_RESNET_FMA_TILES(X, prefix, math, load)                   \
  X(prefix##_32x32, Tile32x32, Math::math, Load::load, Epilogue::kTail) \
  X(prefix##_64x64, Tile64x64, Math::math, Load::load, Epilogue::kTail) \
  X(prefix##_128x64, TileFma128x64, Math::math, Load::load, Epilogue::kTail)

// A tile of the Hopper family (wgmma_gemm.cuh): kM pixels x kN channels, 64 elements of the depth a step. One
// block per SM, of a warpgroup that loads and two that multiply; of each 128 pixels these take 64.
template <int M, int N, int Stages, int StagingColumns>
struct WgmmaTile {
  static constexpr int kM = M, kN = N, kDepthBytes = 128, kStages = Stages, kBlocks = 1;
  static constexpr int kConsumerWarps = 8, kThreads = 32 * (4 + kConsumerWarps);
  static constexpr int kRowBlocks = M / 128;  // products of 64 rows that a warpgroup has under way
  static constexpr int kBytesA = M * kDepthBytes, kBytesB = N * kDepthBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // A projection needs the registers for a second sum.
  static constexpr bool kProjection = kRowBlocks == 1;

  // Dynamic shared memory, in this order; offsets in bytes. The stages are whole patterns of the 128-byte
  // swizzle (1024 bytes). Nothing shares memory, so that loads fly while a tile is stored.
  static constexpr int kStagingColumns = StagingColumns, kStagingPitch = (StagingColumns + 8) * 4;
  static constexpr int kStagingBytes = 16 * kStagingPitch;  // of each consumer warp: fp32 rows
  static constexpr int kStagingOffset = Stages * kStageBytes;
  static constexpr int kNormBytes = 4 * N * 4;  // scale, shift of source 0, then of source 1
  static constexpr int kNormOffset = kStagingOffset + kConsumerWarps * kStagingBytes;
  static constexpr int kBarrierOffset = kNormOffset + 2 * kNormBytes;
  template <Load kLoad>
  static constexpr int kSharedBytes = kBarrierOffset + 8 * (2 * Stages + 4);
  static constexpr int kParkBytes = 0;
  static_assert(M % 128 == 0 && N % StagingColumns == 0, "whole warpgroups, whole passes");
};

using Wgmma128x64 = WgmmaTile<128, 64, 7, 64>;
using Wgmma128x128 = WgmmaTile<128, 128, 5, 64>;
using Wgmma256x128 = WgmmaTile<256, 128, 4, 32>;

#define FUSED_RESNET_WGMMA_TILES(X, prefix, math)                                  \
  X(prefix##_128x64, Wgmma128x64, Math::math, Load::kTensorMap, Epilogue::kTail)   \
  X(prefix##_128x128, Wgmma128x128, Math::math, Load::kTensorMap, Epilogue::kTail) \
  X(prefix##_256x128, Wgmma256x128, Math::math, Load::kTensorMap, Epilogue::kTail)
#define FUSED_RESNET_KERNELS_WGMMA_F16(X) FUSED_RESNET_WGMMA_TILES(X, conv_wgmma_f16, kFloat16)
#define FUSED_RESNET_KERNELS_WGMMA_BF16(X) FUSED_RESNET_WGMMA_TILES(X, conv_wgmma_bf16, kBFloat16)
#define FUSED_RESNET_WGMMA_KERNELS(X) \
  FUSED_RESNET_KERNELS_WGMMA_F16(X)   \
  FUSED_RESNET_KERNELS_WGMMA_BF16(X)

#define FUSED_RESNET_KERNELS_F16(X) FUSED_RESNET_TILES(X, conv_f16, kFloat16, kVector)
#define FUSED_RESNET_KERNELS_BF16(X) FUSED_RESNET_TILES(X, conv_bf16, kBFloat16, kVector)
#define FUSED_RESNET_KERNELS_TF32(X) FUSED_RESNET_TILES(X, conv_tf32, kTensorFloat32, kVector)
#define FUSED_RESNET_KERNELS_F32(X) FUSED_RESNET_FMA_TILES(X, conv_f32, kFloat32, kVector)
#define FUSED_RESNET_KERNELS_GATHER_F16(X) FUSED_RESNET_TILES(X, conv_gather_f16, kFloat16, kGather)
#define FUSED_RESNET_KERNELS_GATHER_BF16(X) FUSED_RESNET_TILES(X, conv_gather_bf16, kBFloat16, kGather)
#define FUSED_RESNET_KERNELS_GATHER_TF32(X) FUSED_RESNET_TILES(X, conv_gather_tf32, kTensorFloat32, kGather)
#define FUSED_RESNET_KERNELS_GATHER_F32(X) FUSED_RESNET_FMA_TILES(X, conv_gather_f32, kFloat32, kGather)

// Convolution with the statistics of its output: fewer tiles, since training has large batches.
#define FUSED_RESNET_STATISTICS(X, symbol, tile, math, load) \
  X(symbol, tile, Math::math, Load::load, Epilogue::kStatistics)
#define FUSED_RESNET_KERNELS_STATS_F16(X)                                            \
  FUSED_RESNET_STATISTICS(X, conv_f16_stats_64x64, Tile64x64, kFloat16, kVector)     \
  FUSED_RESNET_STATISTICS(X, conv_f16_stats_128x128, Tile128x128, kFloat16, kVector) \
  FUSED_RESNET_STATISTICS(X, conv_gather_f16_stats_64x64, Tile64x64, kFloat16, kGather)
#define FUSED_RESNET_KERNELS_STATS_BF16(X)                                             \
  FUSED_RESNET_STATISTICS(X, conv_bf16_stats_64x64, Tile64x64, kBFloat16, kVector)     \
  FUSED_RESNET_STATISTICS(X, conv_bf16_stats_128x128, Tile128x128, kBFloat16, kVector) \
  FUSED_RESNET_STATISTICS(X, conv_gather_bf16_stats_64x64, Tile64x64, kBFloat16, kGather)
#define FUSED_RESNET_KERNELS_STATS_F32(X)                                                      \
  FUSED_RESNET_STATISTICS(X, conv_tf32_stats_64x64, Tile64x64, kTensorFloat32, kVector)        \
  FUSED_RESNET_STATISTICS(X, conv_f32_stats_64x64, Tile64x64, kFloat32, kVector)               \
  FUSED_RESNET_STATISTICS(X, conv_gather_tf32_stats_64x64, Tile64x64, kTensorFloat32, kGather) \
  FUSED_RESNET_STATISTICS(X, conv_gather_f32_stats_64x64, Tile64x64, kFloat32, kGather)

#define FUSED_RESNET_KERNELS(X)       \
  FUSED_RESNET_KERNELS_F16(X)         \
  FUSED_RESNET_KERNELS_BF16(X)        \
  FUSED_RESNET_KERNELS_TF32(X)        \
  FUSED_RESNET_KERNELS_F32(X)         \
  FUSED_RESNET_KERNELS_GATHER_F16(X)  \
  FUSED_RESNET_KERNELS_GATHER_BF16(X) \
  FUSED_RESNET_KERNELS_GATHER_TF32(X) \
  FUSED_RESNET_KERNELS_GATHER_F32(X)  \
  FUSED_RESNET_KERNELS_STATS_F16(X)   \
  FUSED_RESNET_KERNELS_STATS_BF16(X)  \
  FUSED_RESNET_KERNELS_STATS_F32(X)

}  // namespace fused_resnet
