// One binary, several instruction sets: each kernel is instantiated in isa_portable_*.cpp, isa_avx2_*.cpp,
// isa_avx512_*.cpp, isa_avx512_bf16_*.cpp and isa_amx_*.cpp, and the best set that this CPU has is taken at
// run time.
#pragma once

#include <string>
#include <vector>

#include "checksum.h"
#include "conv.h"
#include "epilogue.h"

namespace fused_resnet::cpu {

struct Kernels {
  const char* isa;      // "amx", "avx512_bf16", "avx512", "avx2" or "portable"
  const char* vectors;  // the same but for "amx" and "avx512_bf16", whose float32 vector code is "avx512"'s
  ConvKernel direct, winograd2, winograd4, fresh_winograd2, fresh_winograd4;
  PooledKernel pooled;
  EpilogueKernel epilogue;
  ChecksumKernel checksum;
  // Activations in bfloat16: absent (nullptr) in "avx512" and "avx2".
  ConvKernel bf16_direct = {}, bf16_winograd2 = {}, bf16_winograd4 = {}, bf16_fresh_winograd2 = {},
             bf16_fresh_winograd4 = {};
  PooledKernel bf16_pooled = {};
  // Matrix tiles: absent in "avx512_bf16" as well.
  ConvKernel bf16x3_direct = {}, fresh_bf16x3_direct = {}, bf16x3_winograd2 = {}, bf16x3_winograd4 = {};
  PooledKernel bf16x3_stem = {};
};

// The parts of a set, a file each: they compile side by side, and none takes long or much memory. Each runs
// code of its instruction set.
struct Portable;
struct Avx2;
struct Avx512;
struct Avx512Bf16;
struct Amx;
template <class Isa>
void add_direct(Kernels& set);
template <class Isa>
void add_winograd2(Kernels& set);
template <class Isa>
void add_winograd4(Kernels& set);
template <class Isa>
void add_bf16_direct(Kernels& set);
template <class Isa>
void add_bf16_winograd2(Kernels& set);
template <class Isa>
void add_bf16_winograd4(Kernels& set);
template <class Isa>
void add_bf16x3_direct(Kernels& set);
template <class Isa>
void add_bf16x3_winograd(Kernels& set);

// To be called where the CPU has the instruction set.
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();  // those of AVX-512 and the ones of bfloat16
const Kernels& kernels_amx();          // and the ones on matrix tiles
#endif
const Kernels& kernels_portable();

// The kernels of the named instruction set; nullptr where this CPU does not have it, or where
// FUSED_RESNET_CPU_ISA names a lesser one: that one is then the best.
const Kernels* kernels_for(const char* isa);
// Those of the best one.
const Kernels& kernels();
// The names of all that `kernels_for` knows here, the best first.
std::vector<std::string> isas();

inline const char* best_isa() {
  return kernels().isa;
}

}  // namespace fused_resnet::cpu
