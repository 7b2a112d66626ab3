// What one group of four means: tables and the scalar reference shared by the per-ISA files.
// Everything is in an anonymous namespace, so that no file can pick up code compiled for another file's ISA.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "columns.h"
#include "ewma.h"
#include "floats.h"
#include "sparse24.h"

namespace swiftprune {
namespace {

// For a 4-bit set of non-zero kept positions (at most two of them): the metadata nibble. Groups with fewer than two
// non-zeros are filled up with the positions that CUTLASS and torch use, so that metadata is equal word for word.
// Index: bit i set = position i kept. 0 marks sets of three or four, which have no encoding.
constexpr std::array<uint8_t, 16> kNibble = {
    0b1110, 0b1000, 0b1001, 0b0100,  // {}->(2,3) {0}->(0,2) {1}->(1,2) {0,1}
    0b1110, 0b1000, 0b1001, 0,       // {2}->(2,3) {0,2} {1,2}
    0b1110, 0b1100, 0b1101, 0,       // {3}->(2,3) {0,3} {1,3}
    0b1110, 0,      0,      0,       // {2,3}
};

constexpr uint8_t positions_of(uint8_t nibble) {
  return static_cast<uint8_t>((1u << (nibble & 3u)) | (1u << (nibble >> 2)));
}

constexpr bool valid_nibble(uint8_t nibble) { return (nibble & 3u) < (nibble >> 2); }

// The same for two neighbouring groups at once, one byte of metadata.
struct PairTables {
  std::array<uint8_t, 256> metadata{};   // kept set -> metadata byte
  std::array<uint8_t, 256> stored{};     // kept set -> set of the positions that are stored (two per group)
  std::array<uint8_t, 256> positions{};  // metadata byte -> set of the positions that are stored
  std::array<bool, 256> valid{};         // metadata byte -> both nibbles valid
};

constexpr PairTables make_pair_tables() {
  PairTables t;
  for (int i = 0; i < 256; ++i) {
    const uint8_t low = kNibble[i & 15], high = kNibble[i >> 4];
    t.metadata[i] = static_cast<uint8_t>(low | high << 4);
    t.stored[i] = static_cast<uint8_t>(positions_of(low) | positions_of(high) << 4);
    t.positions[i] = static_cast<uint8_t>(positions_of(i & 15) | positions_of(i >> 4) << 4);
    t.valid[i] = valid_nibble(i & 15) && valid_nibble(i >> 4);
  }
  return t;
}
constexpr PairTables kPairs = make_pair_tables();

template <class T>
constexpr typename T::Bits kMagnitudeMask = static_cast<typename T::Bits>(~typename T::Bits{0}) >> 1;

// A zero scores below everything, so that it never takes the place of a weight whose score is 0 too.
constexpr float kScoreOfZero = -std::numeric_limits<float>::infinity();

inline float score_of(float w, float column, const float* cross, const float* row, const float* curvature) {
  if (w == 0.0f) return kScoreOfZero;
  float v = std::fabs(w) * (row ? column + *row * *cross : column);
  if (curvature) {
    v = v * v;
    v = v * (1.0f - *curvature * v);
  }
  return v;
}

// Stores group g of a row: `kept` is the set of its non-zero kept positions, at most two of them.
template <class Bits>
void store_group(const Bits* group, unsigned kept, int64_t g, Bits* values, uint8_t* metadata) {
  const uint8_t nibble = kNibble[kept];
  const int positions[kKept] = {nibble & 3, nibble >> 2};
  for (int j = 0; j < kKept; ++j) values[g * kKept + j] = kept >> positions[j] & 1u ? group[positions[j]] : Bits{0};
  uint8_t& byte = metadata[g / 2];
  byte = g % 2 ? static_cast<uint8_t>(byte | nibble << 4) : nibble;
}

// The scalar twin of every SIMD kernel: groups [first, last) of one row.
template <class T>
Status prune_pack_groups(const typename T::Bits* weight, int64_t row_index, int64_t cols, const Factors& f,
                         typename T::Bits* values, uint8_t* metadata, int64_t first, int64_t last) {
  for (int64_t g = first; g < last; ++g) {
    const int64_t k = g * kGroup;
    float score[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const float w = T::to_float(weight[k + i]);
      if (!std::isfinite(w)) return {Fault::kNotFinite, row_index * (cols / kGroup) + g};
      score[i] = score_of(w, f.column[k + i], f.cross ? f.cross + k + i : nullptr, f.row ? f.row + row_index : nullptr,
                          f.curvature ? f.curvature + row_index : nullptr);
    }
    unsigned kept = 0;
    for (int i = 0; i < kGroup; ++i) {
      int wins = 0;
      for (int j = 0; j < kGroup; ++j) wins += j != i && (score[i] > score[j] || (score[i] == score[j] && i < j));
      if (wins >= kKept && (weight[k + i] & kMagnitudeMask<T>)) kept |= 1u << i;
    }
    store_group(weight + k, kept, g, values, metadata);
  }
  return {};
}

template <class T>
Status pack_groups(const typename T::Bits* weight, int64_t row_index, int64_t cols, typename T::Bits* values,
                   uint8_t* metadata, int64_t first, int64_t last) {
  for (int64_t g = first; g < last; ++g) {
    const int64_t k = g * kGroup;
    unsigned kept = 0;
    for (int i = 0; i < kGroup; ++i) {
      if (!std::isfinite(T::to_float(weight[k + i]))) return {Fault::kNotFinite, row_index * (cols / kGroup) + g};
      if (weight[k + i] & kMagnitudeMask<T>) kept |= 1u << i;
    }
    if (!kNibble[kept]) return {Fault::kTooManyNonZeros, row_index * (cols / kGroup) + g};
    store_group(weight + k, kept, g, values, metadata);
  }
  return {};
}

template <class T>
Status unpack_groups(const typename T::Bits* values, const uint8_t* metadata, int64_t row_index, int64_t cols,
                     typename T::Bits* weight, int64_t first, int64_t last) {
  for (int64_t g = first; g < last; ++g) {
    const uint8_t nibble = metadata[g / 2] >> (g % 2 * 4) & 15;
    if (!valid_nibble(nibble)) return {Fault::kBadMetadata, row_index * (cols / kGroup) + g};
    typename T::Bits* out = weight + g * kGroup;
    out[0] = out[1] = out[2] = out[3] = 0;
    out[nibble & 3] = values[g * kKept];
    out[nibble >> 2] = values[g * kKept + 1];
  }
  return {};
}

inline int64_t metadata_stride(int64_t cols) { return (cols / kGroup + 1) / 2; }

// Turns `Isa` (a set of whole-row functions templated on the element type) into the table that dispatch hands out.
template <template <class> class Isa>
struct Table {
  template <class T>
  static Status prune_pack(const void* weight, int64_t cols, const Factors& f, void* values, uint8_t* metadata,
                           int64_t begin, int64_t end) {
    using Bits = typename T::Bits;
    for (int64_t n = begin; n < end; ++n) {
      const Bits* w = static_cast<const Bits*>(weight) + n * cols;
      Bits* v = static_cast<Bits*>(values) + n * (cols / 2);
      uint8_t* m = metadata + n * metadata_stride(cols);
      const int64_t done = Isa<T>::prune_pack(w, n, cols, f, v, m);
      const Status status = prune_pack_groups<T>(w, n, cols, f, v, m, done, cols / kGroup);
      if (status.fault != Fault::kNone) return status;
    }
    return {};
  }

  template <class T>
  static Status pack(const void* weight, int64_t cols, void* values, uint8_t* metadata, int64_t begin, int64_t end) {
    using Bits = typename T::Bits;
    for (int64_t n = begin; n < end; ++n) {
      const Bits* w = static_cast<const Bits*>(weight) + n * cols;
      Bits* v = static_cast<Bits*>(values) + n * (cols / 2);
      uint8_t* m = metadata + n * metadata_stride(cols);
      const int64_t done = Isa<T>::pack(w, cols, v, m);
      const Status status = pack_groups<T>(w, n, cols, v, m, done, cols / kGroup);
      if (status.fault != Fault::kNone) return status;
    }
    return {};
  }

  template <class T>
  static Status unpack(const void* values, const uint8_t* metadata, int64_t cols, void* weight, int64_t begin,
                       int64_t end) {
    using Bits = typename T::Bits;
    for (int64_t n = begin; n < end; ++n) {
      const Bits* v = static_cast<const Bits*>(values) + n * (cols / 2);
      const uint8_t* m = metadata + n * metadata_stride(cols);
      Bits* w = static_cast<Bits*>(weight) + n * cols;
      const int64_t done = Isa<T>::unpack(v, m, cols, w);
      const Status status = unpack_groups<T>(v, m, n, cols, w, done, cols / kGroup);
      if (status.fault != Fault::kNone) return status;
    }
    return {};
  }

#define SWIFTPRUNE_BY_DTYPE(function, dtype, ...)                     \
  switch (dtype) {                                                    \
    case Dtype::kFloat32: return function<Float32>(__VA_ARGS__);      \
    case Dtype::kFloat16: return function<Float16>(__VA_ARGS__);      \
    case Dtype::kBFloat16: return function<BFloat16>(__VA_ARGS__);    \
  }                                                                   \
  return {};

  static Status prune_pack_any(Dtype d, const void* w, int64_t cols, const Factors& f, void* v, uint8_t* m, int64_t b,
                               int64_t e) {
    SWIFTPRUNE_BY_DTYPE(prune_pack, d, w, cols, f, v, m, b, e)
  }
  static Status pack_any(Dtype d, const void* w, int64_t cols, void* v, uint8_t* m, int64_t b, int64_t e) {
    SWIFTPRUNE_BY_DTYPE(pack, d, w, cols, v, m, b, e)
  }
  static Status unpack_any(Dtype d, const void* v, const uint8_t* m, int64_t cols, void* w, int64_t b, int64_t e) {
    SWIFTPRUNE_BY_DTYPE(unpack, d, v, m, cols, w, b, e)
  }
#undef SWIFTPRUNE_BY_DTYPE

  static constexpr Kernels kernels{prune_pack_any, pack_any,      unpack_any, surprise_rows,
                                   prune_columns,  int4_scales,   round_columns, descend_columns};
};

}  // namespace
}  // namespace swiftprune
