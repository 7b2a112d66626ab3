// What goes through a weight column by column, up to 128 of them at a time, each making up for what those before it lack:
// SparseGPT's pruning, and rounding kept weights to values of 8 and 4 bits (swiftprune/methods).
//
// Every sum and product is rounded in the order that swiftprune/kernels/reference.py has, so that all agree bit for bit.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "floats.h"
#include "quantized.h"
#include "sparse24.h"

namespace swiftprune {
namespace {

constexpr int64_t kMostColumns = kQuantInputs;
constexpr float kLargestValue = 127;
constexpr int64_t kLevels = 16;

// Where the nearest level of the codebook changes; behind the last one nothing does.
constexpr std::array<float, kLevels> make_between() {
  std::array<float, kLevels> between{};
  for (int64_t i = 0; i + 1 < kLevels; ++i) between[i] = static_cast<float>(kCodebook[i] + kCodebook[i + 1]) / 2;
  between[kLevels - 1] = std::numeric_limits<float>::infinity();
  return between;
}
constexpr std::array<float, kLevels> kBetween = make_between();

struct Rounded {
  uint8_t value;  // as it is stored
  float weight;   // what it stands for
};

template <int Bits>
Rounded round_to(float weight, float scale) {
  const float wanted = weight / scale;
  if constexpr (Bits == 8) {
    const float level = std::nearbyint(std::min(std::max(wanted, -kLargestValue), kLargestValue));
    return {static_cast<uint8_t>(static_cast<int8_t>(level)), level * scale};
  } else {
    int code = 0;
    for (float between : kBetween) code += wanted > between;
    return {static_cast<uint8_t>(code), static_cast<float>(kCodebook[code]) * scale};
  }
}

// The squared error of `weight` at the nearest levels under `scale`, of its non-zeros, times `importance`: halves added
// to halves, which is an order that lanes of any number can keep.
inline float squared_error(const float* weight, const float* importance, float scale) {
  alignas(64) float error[kMostColumns];
  for (int64_t j = 0; j < kQuantInputs; ++j) {
    const float wanted = weight[j] / scale;
    float level = kCodebook[0];  // and up by a step at each boundary below: exact, as all of them are whole numbers
    for (int64_t i = 0; i + 1 < kLevels; ++i)
      level += wanted > kBetween[i] ? static_cast<float>(kCodebook[i + 1] - kCodebook[i]) : 0.0f;
    const float lacking = level * scale - weight[j];
    error[j] = weight[j] != 0 ? lacking * lacking * importance[j] : 0.0f;
  }
  for (int64_t half = kQuantInputs / 2; half; half /= 2)
    for (int64_t j = 0; j < half; ++j) error[j] += error[j + half];
  return error[0];
}

// scales (rows, ceil(cols / 128)): for each 128 inputs of `weight` (rows, cols) the best of twenty for 4-bit values.
inline void int4_scales(const float* weight, int64_t cols, const float* importance, uint16_t* scales, int64_t begin,
                        int64_t end) {
  // Of the scale at which the largest weight is just reached; a smaller one rounds the many finer and cuts off the few.
  constexpr double kFactors[] = {1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6};
  const int64_t per_row = quant_chunks(cols);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t s = 0; s < per_row; ++s) {
      const int64_t first = s * kQuantInputs, count = std::min(kQuantInputs, cols - first);
      alignas(64) float part[kMostColumns] = {}, weighs[kMostColumns];
      std::copy_n(weight + row * cols + first, count, part);
      std::fill_n(weighs, kQuantInputs, 1.0f);
      if (importance) std::copy_n(importance + first, count, weighs);
      float largest = std::numeric_limits<float>::min() * 1024;
      for (float w : part) largest = std::max(largest, std::fabs(w));
      float lowest = std::numeric_limits<float>::infinity();
      uint16_t best = BFloat16::from_float(static_cast<float>(kFactors[0] / kLargestValue) * largest);
      for (double factor : kFactors) {
        for (double sign : {1.0, -1.0}) {
          const uint16_t scale = BFloat16::from_float(static_cast<float>(sign * factor / kLargestValue) * largest);
          const float error = squared_error(part, weighs, BFloat16::to_float(scale));
          if (error < lowest) {
            lowest = error;
            best = scale;
          }
        }
      }
      scales[row * per_row + s] = best;
    }
  }
}

// SparseGPT within `cols` <= 128 columns of `weight` (rows, cols): what is pruned of each is made up for by those behind it
// through `factor` (cols, cols), upper, and `errors` (rows, cols) is for the columns beyond these. What `keep` (rows, cols)
// has stays, or, where it is null, of every `group` of a row's weights, as they are when it is reached, the `kept` with the
// highest squares over those of the diagonal of `factor`; of equal ones the first. `pruned` (rows, cols) is what becomes of
// them.
inline void prune_columns(const uint8_t* keep, int64_t kept, int64_t group, const float* weight, const float* factor,
                          int64_t cols, float* pruned, float* errors, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    alignas(64) float part[kMostColumns], score[kMostColumns];
    bool stays[kMostColumns];
    std::copy_n(weight + row * cols, cols, part);
    if (keep) std::copy_n(keep + row * cols, cols, stays);
    for (int64_t k = 0; k < cols; ++k) {
      const float* spread = factor + k * cols;
      if (!keep && k % group == 0) {
        for (int64_t i = k; i < k + group; ++i) {
          const float diagonal = factor[i * cols + i];
          score[i] = part[i] * part[i] / (diagonal * diagonal);
        }
        for (int64_t i = k; i < k + group; ++i) {
          int64_t beaten = 0;
          for (int64_t j = k; j < k + group; ++j) beaten += score[i] > score[j] || (score[i] == score[j] && i < j);
          stays[i] = beaten >= group - kept;
        }
      }
      const float stored = stays[k] ? part[k] : 0.0f, error = (part[k] - stored) / spread[k];
      if (error != 0)
        for (int64_t j = k + 1; j < cols; ++j) part[j] -= error * spread[j];
      pruned[row * cols + k] = stored;
      errors[row * cols + k] = error;
    }
  }
}

// GPTQ within `cols` <= 128 columns of `weight` (rows, cols), in the same way: each is rounded in order under the row's
// scale, pruned ones to zero.
template <int Bits>
void round_rows(const float* weight, const uint8_t* keep, const float* factor, const uint16_t* scales, int64_t cols,
                uint8_t* values, float* errors, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    alignas(64) float part[kMostColumns];
    std::copy_n(weight + row * cols, cols, part);
    const float scale = BFloat16::to_float(scales[row]);
    for (int64_t k = 0; k < cols; ++k) {
      const Rounded rounded = round_to<Bits>(part[k], scale);
      const float* spread = factor + k * cols;
      const float error = (part[k] - (keep[row * cols + k] ? rounded.weight : 0.0f)) / spread[k];
      for (int64_t j = k + 1; j < cols; ++j) part[j] -= error * spread[j];
      values[row * cols + k] = rounded.value;
      errors[row * cols + k] = error;
    }
  }
}

inline void round_columns(int bits, const float* weight, const uint8_t* keep, const float* factor,
                          const uint16_t* scales, int64_t cols, uint8_t* values, float* errors, int64_t begin,
                          int64_t end) {
  (bits == 8 ? round_rows<8> : round_rows<4>)(weight, keep, factor, scales, cols, values, errors, begin, end);
}

// Coordinate descent on the 4-bit values of `cols` <= 128 columns: `stored` (rows, cols), what they stand for, is set to
// the level that is best beside all others as they are, column by column. `gradient` is of half the squared error by
// `stored`, negative; `gram` (cols, cols) is what it changes by.
inline void descend_columns(const float* gradient, const uint8_t* keep, const float* gram, const uint16_t* scales,
                            int64_t cols, uint8_t* values, float* stored, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    alignas(64) float part[kMostColumns];
    std::copy_n(gradient + row * cols, cols, part);
    const float scale = BFloat16::to_float(scales[row]);
    float* now = stored + row * cols;
    for (int64_t k = 0; k < cols; ++k) {
      const float* column = gram + k * cols;
      const Rounded best = round_to<4>(now[k] + part[k] / column[k], scale);
      const float weight = keep[row * cols + k] ? best.weight : 0.0f, change = weight - now[k];
      values[row * cols + k] = best.value;
      now[k] = weight;
      if (change != 0)
        for (int64_t j = k + 1; j < cols; ++j) part[j] -= change * column[j];
    }
  }
}

}  // namespace
}  // namespace swiftprune
