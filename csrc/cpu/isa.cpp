#include "isa.h"

#include <cstring>
#include <initializer_list>

namespace fused_resnet::cpu {

const Kernels* kernels_for(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) {
    const bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return present ? &kKernelsAvx512 : nullptr;
  }
  if (std::strcmp(isa, "avx2") == 0) {
    const bool present =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return present ? &kKernelsAvx2 : nullptr;
  }
#endif
  return std::strcmp(isa, "portable") == 0 ? &kKernelsPortable : nullptr;
}

const Kernels& kernels() {
  static const Kernels& best = [&]() -> const Kernels& {
    for (const char* isa : {"avx512", "avx2"}) {
      if (const Kernels* found = kernels_for(isa)) return *found;
    }
    return kKernelsPortable;
  }();
  return best;
}

}  // namespace fused_resnet::cpu
