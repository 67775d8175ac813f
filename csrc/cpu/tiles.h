// Matrix tiles: eight registers of 16 rows of 64 bytes. An operand tile holds bfloat16, A as [row][32 depth],
// B as [depth / 2][16 columns][2]; an accumulator holds [row][16 columns] of float32.
//
// AmxTiles are the processor's own; PlainTiles do the same in plain C++, for tests on any machine and for the
// sanitizers.
#pragma once

#include <cstdint>
#include <cstring>

#include "scalars.h"

namespace fused_resnet::cpu {

constexpr int kTileRows = 16;   // of A and of an accumulator
constexpr int kTileCols = 16;   // of B and of an accumulator
constexpr int kTileDepth = 32;  // of A and B
constexpr int64_t kTileBytes = 1024;

class PlainTiles {
 public:
  // A register: `stride` bytes from row to row.
  template <int kTile>
  void load(const void* from, int64_t stride) {
    load(tile_[kTile], from, stride);
  }
  template <int kTile>
  void store(void* to, int64_t stride) const {
    store(tile_[kTile], to, stride);
  }
  template <int kTile>
  void zero() {
    std::memset(tile_[kTile], 0, sizeof(tile_[kTile]));
  }
  template <int kSum, int kA, int kB>
  void multiply() {
    multiply(tile_[kSum], tile_[kA], tile_[kB]);
  }

 private:
  using Tile = unsigned char[kTileRows][64];

  // Calls: inlined at every place that has an instruction of AmxTiles, they are minutes of compilation.
  FR_NOINLINE static void load(Tile& tile, const void* from, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(tile[row], static_cast<const char*>(from) + row * stride, 64);
    }
  }
  FR_NOINLINE static void store(const Tile& tile, void* to, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(static_cast<char*>(to) + row * stride, tile[row], 64);
    }
  }

  // sum += A B. Intel's definition: even and odd depths are summed apart from zero on, then added.
  FR_NOINLINE static void multiply(Tile& sums, const Tile& a, const Tile& b) {
    for (int row = 0; row < kTileRows; ++row) {
      for (int col = 0; col < kTileCols; ++col) {
        float even = 0, odd = 0;
        for (int pair = 0; pair < kTileDepth / 2; ++pair) {
          even += value(a[row] + 4 * pair) * value(b[pair] + 4 * col);
          odd += value(a[row] + 4 * pair + 2) * value(b[pair] + 4 * col + 2);
        }
        float sum;
        std::memcpy(&sum, sums[row] + 4 * col, 4);
        sum += even + odd;
        std::memcpy(sums[row] + 4 * col, &sum, 4);
      }
    }
  }

  static float value(const unsigned char* bfloat16) {
    uint16_t half;
    std::memcpy(&half, bfloat16, 2);
    const uint32_t bits = uint32_t{half} << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }

  alignas(64) Tile tile_[8] = {};
};

#if defined(FR_TARGET_AMX)
// Inline assembly, since GCC's intrinsics take a literal for the register's number, no template argument.
//
// oneDNN uses the tiles too and may rely on a configuration that it made in an earlier call on this thread:
// what was configured before is put back.
class AmxTiles {
 public:
  FR_INLINE AmxTiles() {
    Configuration all;
    std::memset(&all, 0, sizeof(all));
    all.palette = 1;
    for (int tile = 0; tile < 8; ++tile) all.column_bytes[tile] = 64, all.rows[tile] = kTileRows;
    __asm__ __volatile__("sttilecfg %0" : "=m"(before_)::"memory");
    __asm__ __volatile__("ldtilecfg %0" ::"m"(all) : "memory");
  }
  FR_INLINE ~AmxTiles() {
    if (before_.palette != 0) {
      __asm__ __volatile__("ldtilecfg %0" ::"m"(before_) : "memory");
    } else {
      __asm__ __volatile__("tilerelease" ::: "memory");
    }
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile>
  FR_INLINE void load(const void* from, int64_t stride) {
    __asm__ __volatile__("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  FR_INLINE void store(void* to, int64_t stride) const {
    __asm__ __volatile__("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  FR_INLINE void zero() {
    __asm__ __volatile__("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kSum, int kA, int kB>
  FR_INLINE void multiply() {
    __asm__ __volatile__("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(kB), "i"(kA), "i"(kSum));
  }

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
  };
  Configuration before_;
};
#endif

}  // namespace fused_resnet::cpu
