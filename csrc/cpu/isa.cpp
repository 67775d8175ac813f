#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "../checks.h"

#if defined(__x86_64__)
  #include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

namespace fused_resnet::cpu {
namespace {

// Matrix tiles of bfloat16: the processor must have them, and the system must be asked for the room to save
// them in, once for all threads of the process (Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)).
bool have_amx() {
#if defined(__linux__) && defined(__x86_64__)
  static const bool present = [] {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 7, edx
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return present;
#else
  return false;
#endif
}

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows its name.
bool have_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
bool have_avx512_bf16() {
  constexpr unsigned kAvx512Bf16 = 1u << 5;  // leaf 7, subleaf 1, eax
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvx512Bf16) != 0;
}
#endif

// Best first. Each is a part of those before it, but for bfloat16 and matrix tiles, which "portable" has in
// plain C++.
constexpr const char* kIsas[] = {"amx", "avx512_bf16", "avx512", "avx2", "portable"};
constexpr int kIsaCount = 5;

int index_of(const char* isa) {
  int index = 0;
  while (index < kIsaCount && std::strcmp(isa, kIsas[index]) != 0) ++index;
  return index;
}

const Kernels* of_this_processor(int index) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && have_f16c();
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512dq");
  static const bool avx512_bf16 = avx512 && have_avx512_bf16();
  if (index == 0 && avx512_bf16 && have_amx()) return &kernels_amx();
  if (index == 1 && avx512_bf16) return &kernels_avx512_bf16();
  if (index == 2 && avx512) return &kernels_avx512();
  if (index == 3 && avx2) return &kernels_avx2();
#endif
  return index == kIsaCount - 1 ? &kernels_portable() : nullptr;
}

// The best set in use. What FUSED_RESNET_CPU_ISA names hides all better ones, as on a processor without them.
int best_index() {
  static const int best = [] {
    const char* named = std::getenv("FUSED_RESNET_CPU_ISA");
    if (named != nullptr && *named != '\0') {
      const int index = index_of(named);
      check(of_this_processor(index) != nullptr, "FUSED_RESNET_CPU_ISA",
            "amx, avx512_bf16, avx512, avx2 or portable, as this CPU has it", named);
      return index;
    }
    int index = 0;
    while (of_this_processor(index) == nullptr) ++index;
    return index;
  }();
  return best;
}

}  // namespace

const Kernels* kernels_for(const char* isa) {
  const int index = index_of(isa);
  return index < best_index() ? nullptr : of_this_processor(index);
}

const Kernels& kernels() {
  return *of_this_processor(best_index());
}

std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (int index = best_index(); index < kIsaCount; ++index) {
    if (of_this_processor(index) != nullptr) found.emplace_back(kIsas[index]);
  }
  return found;
}

}  // namespace fused_resnet::cpu
