#if defined(SWIFTPRUNE_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cstring>

#include "linear24.h"
#include "quantized.h"
#include "sparse24.h"

namespace swiftprune {

// __builtin_cpu_supports reads CPUID and, for AVX and AVX-512, XCR0: a CPU whose operating system does not save the
// wide registers counts as not having them.
static bool cpu_runs(const char* isa) {
  if (std::strcmp(isa, "generic") == 0) return true;
#ifdef SWIFTPRUNE_NEON
  if (std::strcmp(isa, "neon") == 0) return true;  // every 64-bit Arm CPU has it
#ifdef __linux__
  if (std::strcmp(isa, "neon_dotprod") == 0) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
#endif
#ifdef SWIFTPRUNE_X86
  __builtin_cpu_init();
  if (std::strcmp(isa, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx512_bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa, "avx512_vnni") == 0)
    return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  if (std::strcmp(isa, "avx_vnni") == 0) return cpu_runs("avx2") && __builtin_cpu_supports("avxvnni");
#endif
  return false;
}

const Kernels* kernels_for(const char* isa) {
  if (!cpu_runs(isa)) return nullptr;
#ifdef SWIFTPRUNE_X86
  if (std::strcmp(isa, "avx2") == 0) return &kAvx2Kernels;
  if (std::strcmp(isa, "avx512") == 0) return &kAvx512Kernels;
#endif
  return std::strcmp(isa, "generic") == 0 ? &kGenericKernels : nullptr;
}

swiftprune_linear24_fn linear24_for(const char* isa, Dtype dtype, Dtype x_dtype) {
  if (!cpu_runs(isa) || (x_dtype != dtype && x_dtype != Dtype::kFloat32)) return nullptr;
#ifdef SWIFTPRUNE_X86
  if (std::strcmp(isa, "avx2") == 0) return swiftprune_linear24_avx2;
  if (std::strcmp(isa, "avx512") == 0) return swiftprune_linear24_avx512;
  if (std::strcmp(isa, "avx512_bf16") == 0)
    return dtype == Dtype::kBFloat16 && x_dtype == dtype ? swiftprune_linear24_avx512_bf16 : nullptr;
#endif
#ifdef SWIFTPRUNE_NEON
  if (std::strcmp(isa, "neon") == 0) return swiftprune_linear24_neon;
#endif
  return std::strcmp(isa, "generic") == 0 ? swiftprune_linear24_generic : nullptr;
}

const QuantKernel* quant_kernel_for(const char* isa) {
  if (!cpu_runs(isa)) return nullptr;
#ifdef SWIFTPRUNE_X86
  if (std::strcmp(isa, "avx512_vnni") == 0) return &kQuantAvx512Vnni;
  if (std::strcmp(isa, "avx_vnni") == 0) return &kQuantAvxVnni;
  if (std::strcmp(isa, "avx2") == 0) return &kQuantAvx2;
#endif
#ifdef SWIFTPRUNE_NEON
  if (std::strcmp(isa, "neon_dotprod") == 0) return &kQuantNeonDotprod;
#endif
  return std::strcmp(isa, "generic") == 0 ? &kQuantGeneric : nullptr;
}

}  // namespace swiftprune
