// How far ahead of its loads a linear kernel asks for the stream: hardware prefetchers start late and stop at pages.
#pragma once

#include <cstdint>

namespace swiftprune {

struct Prefetch {
  int64_t first_level;   // bytes ahead into the first-level cache; 0 for never
  int64_t second_level;  // and into the second-level cache
};

// What was measured to be best on this CPU (docs/kernels.md); it changes no result.
Prefetch prefetch_for(int64_t tokens);

}  // namespace swiftprune
