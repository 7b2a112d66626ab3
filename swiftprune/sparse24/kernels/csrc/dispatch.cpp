#include <cstring>

#include "sparse24.h"

namespace swiftprune {

// __builtin_cpu_supports reads CPUID and, for AVX and AVX-512, XCR0: a CPU whose operating system does not save the
// wide registers counts as not having them.
const Kernels* kernels_for(const char* isa) {
  if (std::strcmp(isa, "generic") == 0) return &kGenericKernels;
#ifdef SWIFTPRUNE_X86
  __builtin_cpu_init();
  if (std::strcmp(isa, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")
               ? &kAvx2Kernels
               : nullptr;
  if (std::strcmp(isa, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2")
               ? &kAvx512Kernels
               : nullptr;
#endif
  return nullptr;
}

}  // namespace swiftprune
