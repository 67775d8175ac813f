// Checksums of memory. Plain structs and raw pointers, no Torch header.
#pragma once

#include <cstdint>
#include <cstring>

namespace fused_resnet::cpu {

// 512 bits, so that equal checksums mean equal bytes for all that is not made to collide.
struct Digest {
  static constexpr int kLanes = 8;
  uint64_t lane[kLanes] = {};

  bool operator==(const Digest& other) const { return std::memcmp(lane, other.lane, sizeof(lane)) == 0; }
};

// Goes on from what `digest` holds; `bytes` behind the last whole 64 count as if zeros followed.
using ChecksumKernel = void (*)(const unsigned char* data, int64_t bytes, Digest& digest);

}  // namespace fused_resnet::cpu
