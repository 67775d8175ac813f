#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

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
    constexpr unsigned kAvx512Bf16 = 1u << 5;                     // leaf 7, subleaf 1, eax
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & kAvx512Bf16) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return present;
#else
  return false;
#endif
}

}  // namespace

const Kernels* kernels_for(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) {
    const bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return present ? &kernels_avx512() : nullptr;
  }
  if (std::strcmp(isa, "amx") == 0) {
    if (kernels_for("avx512") == nullptr || !have_amx()) return nullptr;
    return &kernels_amx();
  }
  if (std::strcmp(isa, "avx2") == 0) {
    const bool present =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return present ? &kernels_avx2() : nullptr;
  }
#endif
  return std::strcmp(isa, "portable") == 0 ? &kernels_portable() : nullptr;
}

const Kernels& kernels() {
  static const Kernels& best = [&]() -> const Kernels& {
    const char* named = std::getenv("FUSED_RESNET_CPU_ISA");
    if (named != nullptr && *named != '\0') {
      const Kernels* found = kernels_for(named);
      check(found != nullptr, "FUSED_RESNET_CPU_ISA", "amx, avx512, avx2 or portable, as this CPU has it",
            named);
      return *found;
    }
    for (const char* isa : {"amx", "avx512", "avx2"}) {
      if (const Kernels* found = kernels_for(isa)) return *found;
    }
    return kernels_portable();
  }();
  return best;
}

}  // namespace fused_resnet::cpu
