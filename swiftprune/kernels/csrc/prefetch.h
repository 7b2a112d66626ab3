// How far ahead of its loads a linear kernel prefetches the tiled weight: hardware prefetchers start late and stop at pages.
#pragma once

#include <cstdint>

namespace swiftprune {

struct Prefetch {
  int64_t first_level;   // bytes ahead into the L1; 0 for never
  int64_t second_level;  // and into the L2
};

// What was measured to be best on this CPU (docs/kernels.md); it changes no result.
Prefetch prefetch_for(int64_t tokens);

}  // namespace swiftprune
