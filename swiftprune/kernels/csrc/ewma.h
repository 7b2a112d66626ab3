// The running threshold of EWMA selection (swiftprune/methods/mask.py), 16 rows abreast.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "sparse24.h"

namespace swiftprune {
namespace {

// The recurrence runs along a row, so lanes are rows: 16 x 16 tiles are transposed in, advanced and transposed out.
constexpr int64_t kLanes = 16;

inline void surprise_rows(const float* score, int64_t cols, const float* mean0, const float* deviation0,
                          const EwmaGains& gains, float* ewma_zscore, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t lanes = std::min(kLanes, end - row);
    float mean[kLanes] = {}, deviation[kLanes] = {};
    std::copy_n(mean0 + row, lanes, mean);
    std::copy_n(deviation0 + row, lanes, deviation);
    float tile[kLanes][kLanes] = {};
    for (int64_t k = 0; k < cols; k += kLanes) {
      const int64_t width = std::min(kLanes, cols - k);
      for (int64_t r = 0; r < lanes; ++r)
        for (int64_t i = 0; i < width; ++i) tile[i][r] = score[(row + r) * cols + k + i];
      for (int64_t i = 0; i < width; ++i) {
        for (int64_t r = 0; r < kLanes; ++r) {
          const float distance = tile[i][r] - mean[r];
          tile[i][r] = distance / (deviation[r] + gains.floor);
          deviation[r] = deviation[r] + gains.deviation * (std::fabs(distance) - deviation[r]);
          mean[r] = mean[r] + gains.mean * distance;
        }
      }
      for (int64_t r = 0; r < lanes; ++r)
        for (int64_t i = 0; i < width; ++i) ewma_zscore[(row + r) * cols + k + i] = tile[i][r];
    }
  }
}

// Unsigned keys in the order of the floats they come from (no NaN).
inline uint32_t ordered_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Adds to counts[65536]: by the high half of the key, or, with `prefix` >= 0, by the low half of those keys whose high
// half is `prefix`.
inline void count_keys(const float* values, int64_t begin, int64_t end, int64_t prefix, int64_t* counts) {
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t key = ordered_key(values[i]);
    if (prefix < 0)
      ++counts[key >> 16];
    else if (key >> 16 == static_cast<uint32_t>(prefix))
      ++counts[key & 0xffffu];
  }
}

}  // namespace
}  // namespace swiftprune
