#include "isa.h"

namespace fused_resnet::cpu {
namespace {

// Runs code made for Isa.
template <class Isa>
Kernels vector_kernels(const char* name) {
  Kernels set{};
  set.isa = set.vectors = name;
  add_direct<Isa>(set);
  add_winograd2<Isa>(set);
  add_winograd4<Isa>(set);
  return set;
}

template <class Isa>
Kernels with_bfloat16(Kernels set, const char* name) {
  set.isa = name;
  add_bf16_direct<Isa>(set);
  add_bf16_winograd2<Isa>(set);
  add_bf16_winograd4<Isa>(set);
  return set;
}

template <class Isa>
Kernels with_matrix_tiles(Kernels set, const char* name) {
  set.isa = name;
  add_bf16x3_direct<Isa>(set);
  add_bf16x3_winograd<Isa>(set);
  return set;
}

}  // namespace

#if defined(__x86_64__)
const Kernels& kernels_avx2() {
  static const Kernels set = vector_kernels<Avx2>("avx2");
  return set;
}
const Kernels& kernels_avx512() {
  static const Kernels set = vector_kernels<Avx512>("avx512");
  return set;
}
const Kernels& kernels_avx512_bf16() {
  static const Kernels set = with_bfloat16<Avx512Bf16>(kernels_avx512(), "avx512_bf16");
  return set;
}
const Kernels& kernels_amx() {
  static const Kernels set = with_matrix_tiles<Amx>(kernels_avx512_bf16(), "amx");
  return set;
}
#endif
const Kernels& kernels_portable() {
  static const Kernels set = with_matrix_tiles<Portable>(
      with_bfloat16<Portable>(vector_kernels<Portable>("portable"), "portable"), "portable");
  return set;
}

}  // namespace fused_resnet::cpu
