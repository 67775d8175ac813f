#include "schedule.h"

#include <algorithm>

namespace fused_resnet {
namespace {

// Cycles and bytes of one SM. A model, not a measurement: it only has to rank tiles, and the tuner replaces
// it where there is a GPU. Bandwidths per cycle and SM: shared memory 128 bytes on every architecture; L2
// about 5 TB/s over 108 SMs at 1.4 GHz, so 32 bytes and some more; a copy from it lands after about 700
// cycles.
constexpr double kSharedBandwidth = 128, kL2Bandwidth = 40, kCopyLatency = 700;
constexpr double kStoreBandwidth = 24;   // to and from memory, with a share of L2
constexpr double kBlockOverhead = 1500;  // addresses, filling and draining the pipeline
constexpr double kSplitOverhead = 1500;  // the counter's round trip, and waiting for the last block

constexpr double kWgmmaRate = 1830;  // 720 TFLOP/s, where the peak of 2048 is 806
constexpr double kHandOver = 300;    // between the last product of a tile and the first of the next

// Products (multiply-adds) per cycle and SM. mma.sync reaches about 62 % of what wgmma reaches on sm_90.
double product_rate(Math math, int capability) {
  const bool data_centre = capability == 80 || capability == 90 || capability == 100 || capability == 103;
  const double half = capability == 80 ? 1024 : data_centre ? 1270 : 512;
  if (math == Math::kTensorFloat32) return half / 2;
  if (math == Math::kFloat32) return capability <= 80 ? 64 : 128;
  return half;
}

// Side of the square with the area of one warp's tile: each byte of the other operand is read once per side.
double warp_side(const KernelInfo& kernel) {
  const int area = kernel.tile_m * kernel.tile_n / (kernel.threads / 32);
  return area >= 4096 ? 64 : area >= 2048 ? 45 : area >= 1024 ? 32 : area >= 512 ? 22 : 16;
}

double step_cycles(const KernelInfo& kernel, int vector_bytes, int capability, double blocks_together) {
  const int element_bytes = kernel.math == Math::kFloat16 || kernel.math == Math::kBFloat16 ? 2 : 4;
  const double copied = (kernel.tile_m + kernel.tile_n) * kernel.depth_bytes;
  const double products = 1.0 * kernel.tile_m * kernel.tile_n * kernel.depth_bytes / element_bytes;
  const double shared = (products * 2 * element_bytes / warp_side(kernel) + copied) / kSharedBandwidth;
  // A gathered piece takes about 16 instructions of a warp's 32 lanes, and an SM issues 4 a cycle.
  const double gather = kernel.load == Load::kGather ? copied / vector_bytes / 32 * 16 / 4 : 0;
  const double busy =
      std::max({products / product_rate(kernel.math, capability), shared, copied / kL2Bandwidth});
  const int ahead = capability < 80 ? 1 : kernel.stages - 1;
  return std::max(kCopyLatency / ahead, blocks_together * (busy + gather));
}

// Bytes from and to memory per cycle and SM: 1.55 TB/s over 108 SMs at 1.4 GHz, 4.3 over 132 at 1.75, 8 over
// 148 at 1.9; on cards without HBM about 1.8 over 170 at 2.4.
double memory_rate(int capability) {
  return capability == 80 ? 10 : capability == 90 ? 18 : capability == 100 || capability == 103 ? 28 : 4;
}

// Whether the tensors, each moved once, take at least half as long as the products: as much as a larger tile
// cannot win back where the two do not overlap.
bool moves_much(const ConvParams& params, bool residual, Math math, int capability) {
  const double element_bytes = math == Math::kFloat16 || math == Math::kBFloat16 ? 2 : 4;
  const double outputs = 1.0 * params.pixels * params.k, images = 1.0 * params.pixels / params.p / params.q;
  double bytes = outputs * (params.y_dtype == kFloat32 ? 4 : 2), depth = 0;
  if (residual) bytes += outputs * (params.residual_dtype == kFloat32 ? 4 : 2);
  for (int i = 0; i < params.sources; ++i) {
    const ConvSource& source = params.source[i];
    const double read = std::min(1.0 * source.h * source.w, 1.0 * params.p * params.q * source.r * source.s);
    bytes += (images * read * source.c + 1.0 * source.depth * params.k) * element_bytes;
    depth += source.depth;
  }
  return bytes / memory_rate(capability) > 0.5 * outputs * depth / product_rate(math, capability);
}

int64_t blocks_per_sm(const KernelInfo& kernel, const DeviceProperties& device, int shared_bytes) {
  const int64_t by_shared =
      device.shared_bytes_per_sm / (shared_bytes + 1024);  // 1 KiB belongs to the system
  return std::clamp<int64_t>(by_shared, 1, kernel.blocks_per_sm);
}

// The Hopper family: one block per SM takes tile after tile, and the copies of the next fly while this one is
// multiplied and stored, so only the slower of the two counts.
double persistent_cycles(const KernelInfo& kernel, const DeviceProperties& device, int64_t tiles,
                         int64_t steps) {
  const double copied = (kernel.tile_m + kernel.tile_n) * kernel.depth_bytes;
  const double products = 1.0 * kernel.tile_m * kernel.tile_n * kernel.depth_bytes / 2;
  const double copies = std::max(kCopyLatency / (kernel.stages - 1), copied / kL2Bandwidth);
  const double store = kernel.tile_m * kernel.tile_n * 4.0 / kStoreBandwidth;
  const double tile = std::max(steps * products / kWgmmaRate + kHandOver + store, steps * copies);
  return kBlockOverhead + static_cast<double>(ceil_div(tiles, device.sm_count)) * tile;
}

double launch_cycles(const KernelInfo& kernel, const ConvParams& params, const DeviceProperties& device,
                     int shared_bytes, int64_t tiles, int64_t steps, int64_t splits) {
  const int64_t resident = blocks_per_sm(kernel, device, shared_bytes);
  const int64_t blocks = tiles * splits;
  const int64_t rounds = ceil_div(blocks, device.sm_count * resident);
  const double together = static_cast<double>(std::min(resident, ceil_div(blocks, device.sm_count)));
  const double tile_bytes = kernel.tile_m * kernel.tile_n * 4.0;
  const double step = step_cycles(kernel, params.source[0].vector_bytes, device.capability, together);
  const double store = together * tile_bytes / kStoreBandwidth;
  const double reduce = splits == 1 ? 0 : kSplitOverhead + store + splits * tile_bytes / kL2Bandwidth;
  return static_cast<double>(rounds) * (kBlockOverhead + ceil_div(steps, splits) * step + store + reduce);
}

int64_t steps_of(const ConvParams& params, const KernelInfo& kernel) {
  const int element_bytes = kernel.math == Math::kFloat16 || kernel.math == Math::kBFloat16 ? 2 : 4;
  int64_t steps = 0;
  for (int i = 0; i < params.sources; ++i) {
    steps += kernel.load == Load::kTensorMap
                 ? tensor_map_steps(params.source[i])
                 : ceil_div(params.source[i].depth, kernel.depth_bytes / element_bytes);
  }
  return steps;
}

}  // namespace

Schedule choose_schedule(const ConvParams& params, bool residual, const Candidates& candidates,
                         const DeviceProperties& device, const Forced& forced) {
  constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};
  const bool in_company = moves_much(params, residual, candidates.math, device.capability);
  Schedule best{-1, 1};
  double best_cycles = 0;
  bool best_alone = true;
  for (int i = 0; i < kernel_count(); ++i) {
    const KernelInfo& kernel = kernel_info(i);
    const bool wgmma = kernel.load == Load::kTensorMap;
    if (kernel.math != candidates.math || kernel.epilogue != candidates.epilogue) continue;
    if (wgmma ? !candidates.wgmma : !candidates.mma || kernel.load != candidates.load) continue;
    if (params.sources == 2 && !kernel.projection) continue;
    if (forced.tile_m && kernel.tile_m != forced.tile_m) continue;
    if (forced.tile_n && kernel.tile_n != forced.tile_n) continue;
    const int least_shared = shared_bytes_on(kernel, device.capability);
    const int shared_bytes = least_shared + (params.sources == 2 ? kernel.park_bytes : 0);
    if (least_shared == 0 || shared_bytes > device.shared_bytes_per_block) continue;
    const int64_t tiles = ceil_div(params.pixels, kernel.tile_m) * ceil_div(params.k, kernel.tile_n);
    const int64_t steps = steps_of(params, kernel);
    // A block alone on its SM moves nothing while it multiplies, and loads nothing while it stores; one of
    // the Hopper family does.
    const bool alone = in_company && !wgmma && blocks_per_sm(kernel, device, shared_bytes) == 1;
    const auto consider = [&](int splits) {
      const double cycles = wgmma ? persistent_cycles(kernel, device, tiles, steps)
                                  : launch_cycles(kernel, params, device, shared_bytes, tiles, steps, splits);
      if (best.kernel < 0 || (alone == best_alone ? cycles < best_cycles : best_alone)) {
        best = {i, splits};
        best_cycles = cycles;
        best_alone = alone;
      }
    };
    if (wgmma) {
      consider(1);
    } else if (forced.splits) {
      consider(forced.splits);
    } else {
      for (const int splits : kSplits) {
        if (splits <= steps) consider(splits);
      }
    }
  }
  return best;
}

}  // namespace fused_resnet
