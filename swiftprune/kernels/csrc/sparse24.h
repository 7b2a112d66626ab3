// 2:4 select, pack and unpack on the CPU: the plain C++ interface between Python and the per-ISA kernels.
//
// Layout (the specification is the docstring of swiftprune/formats/spec.py):
//   weight    (rows, cols)               fp32 | fp16 | bf16, row-major, cols % 4 == 0
//   values    (rows, cols / 2)           same dtype: the two kept weights of each group, ascending position
//   metadata  (rows, ceil(cols / 8))     low nibble: first group; nibble = pos0 | pos1 << 2
#pragma once

#include <cstddef>
#include <cstdint>

namespace swiftprune {

constexpr int64_t kGroup = 4;
constexpr int64_t kKept = 2;

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Score of weight (n, k), kept in this order of operations so that every ISA and torch agree bit for bit:
//   v     = |w| * (column[k] + row[n] * cross[k])      without row:       v = |w| * column[k]
//   score = (v * v) * (1 - curvature[n] * (v * v))     without curvature: score = v
struct Factors {
  const float* column;     // (cols)
  const float* cross;      // (cols) or null, together with row
  const float* row;        // (rows) or null
  const float* curvature;  // (rows) or null
};

enum class Fault : int { kNone = 0, kNotFinite = 1, kTooManyNonZeros = 2, kBadMetadata = 3 };

// The first offending place in row-major order; `index` counts groups of four from the start of the tensor.
struct Status {
  Fault fault = Fault::kNone;
  int64_t index = 0;
};

// Gains of the two running averages, and what is added to the deviation so that nothing is divided by zero.
struct EwmaGains {
  float mean;
  float deviation;
  float floor;
};

// Each function works on rows [begin, end) and stops at its first fault.
struct Kernels {
  // Keeps the two highest scores of each group of four; of equal scores the lower position wins.
  Status (*prune_pack)(Dtype, const void* weight, int64_t cols, const Factors&, void* values, uint8_t* metadata,
                       int64_t begin, int64_t end);
  // Packs a weight that already has at most two non-zeros in each group.
  Status (*pack)(Dtype, const void* weight, int64_t cols, void* values, uint8_t* metadata, int64_t begin, int64_t end);
  Status (*unpack)(Dtype, const void* values, const uint8_t* metadata, int64_t cols, void* weight, int64_t begin,
                   int64_t end);
  // ewma_zscore[n, k] = (score - m) / (d + floor), m and d the running mean and deviation of row n before column k.
  void (*ewma_zscore)(const float* score, int64_t cols, const float* mean0, const float* deviation0, const EwmaGains&,
                   float* ewma_zscore, int64_t begin, int64_t end);
  // Column by column: see columns.h.
  void (*prune_columns)(const uint8_t* keep, int64_t kept, int64_t group, const float* weight, const float* factor,
                        int64_t cols, float* pruned, float* errors, int64_t begin, int64_t end);
  void (*int4_scales)(const float* weight, int64_t cols, const float* importance, uint16_t* scales, int64_t begin,
                      int64_t end);
  void (*round_columns)(int bits, const float* weight, const uint8_t* keep, const float* factor, const uint16_t* scales,
                        int64_t cols, uint8_t* values, float* errors, int64_t begin, int64_t end);
  void (*descend_columns)(const float* gradient, const uint8_t* keep, const float* gram, const uint16_t* scales,
                          int64_t cols, uint8_t* values, float* stored, int64_t begin, int64_t end);
};

extern const Kernels kGenericKernels;
#ifdef SWIFTPRUNE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// Null when the name is unknown or this CPU (or its operating system) cannot run it.
const Kernels* kernels_for(const char* isa);

}  // namespace swiftprune
