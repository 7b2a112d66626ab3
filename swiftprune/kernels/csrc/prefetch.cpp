#include "prefetch.h"

#ifdef SWIFTPRUNE_X86
#include <cpuid.h>
#endif

namespace swiftprune {
namespace {

bool is_zen4() {
#ifdef SWIFTPRUNE_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAuth = 0x68747541;  // "Auth" of AuthenticAMD
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != kAuth || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned family = (a >> 8 & 15) + (a >> 20 & 255), model = (a >> 4 & 15) | (a >> 12 & 240);
  return family == 0x19 && ((model >= 0x10 && model < 0x20) || (model >= 0x60 && model < 0x80) || model >= 0xa0);
#else
  return false;
#endif
}

}  // namespace

Prefetch prefetch_for(int64_t tokens) {
  static const bool zen4 = is_zen4();
  if (!zen4) return {9216, 0};
  // Its first level waits for few lines at a time: a far prefetch into it holds up the loads of the inputs. With one
  // token the loads follow each other fast enough for the hardware's own prefetcher.
  return tokens == 1 ? Prefetch{0, 0} : Prefetch{2304, 18432};
}

}  // namespace swiftprune
