// y = x W^T + b over the tiled of a packed 2:4 weight (tiled.h): a plain C interface on raw pointers, so that every
// host (Python, ONNX Runtime's custom ops) can call it.
#pragma once

#include "sparse24.h"

extern "C" {

struct swiftprune_linear24_args {
  int dtype;    // swiftprune::Dtype of the tiled values and of bias
  int x_dtype;  // the same, or kFloat32 for inputs that are not rounded to it
  int y_dtype;  // the same, or kFloat32 for the unrounded sums
  const void* tiled;
  const void* bias;  // (rows) or null
  const void* x;     // (tokens, cols), rows x_stride elements apart
  int64_t x_stride;
  void* y;  // (tokens, rows), rows y_stride elements apart; every element is written
  int64_t y_stride;
  int64_t tokens;
  int64_t rows;
  int64_t cols;
};

// Computes the outputs of row blocks [first, last). Calls on disjoint blocks may run at the same time, and how the
// blocks are divided among calls does not change a bit of the result.
typedef void (*swiftprune_linear24_fn)(const swiftprune_linear24_args*, int64_t first, int64_t last);

void swiftprune_linear24_generic(const swiftprune_linear24_args*, int64_t first, int64_t last);
#ifdef SWIFTPRUNE_X86
void swiftprune_linear24_avx2(const swiftprune_linear24_args*, int64_t first, int64_t last);
void swiftprune_linear24_avx512(const swiftprune_linear24_args*, int64_t first, int64_t last);
void swiftprune_linear24_avx512_bf16(const swiftprune_linear24_args*, int64_t first, int64_t last);  // all bf16
#endif
#ifdef SWIFTPRUNE_NEON
void swiftprune_linear24_neon(const swiftprune_linear24_args*, int64_t first, int64_t last);
#endif
}

namespace swiftprune {

// Of the tiled weight; below, waking another thread costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;

// Instruction sets that may have a linear kernel, fastest first.
constexpr const char* kLinearIsas[] = {"avx512_bf16", "avx512", "avx2", "neon", "generic"};

// Null when the name is unknown, or this CPU (or its operating system) cannot run it, or it has no kernel for values of
// `dtype` and inputs of `x_dtype`.
swiftprune_linear24_fn linear24_for(const char* isa, Dtype dtype, Dtype x_dtype);

}  // namespace swiftprune
