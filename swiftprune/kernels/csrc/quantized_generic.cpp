#include <type_traits>

#include "quantized_kernel.h"

namespace swiftprune {
namespace {

// The scalar twin of the vector kernels, and what runs where there is none.
struct Vector {
  static constexpr int kLanes = 1;
  static constexpr int kTokens = 2;
  static constexpr int kOffset = 0;
  struct Index {
    uint8_t at[16];
  };
  struct Weights {
    int8_t value[16];
  };
  struct Ints {
    int32_t lane[4];
  };
  struct Floats {
    float lane[4];
  };

  static Ints zero() { return {}; }
  static Floats zero_floats() { return {}; }
  static Index index(const uint8_t* metadata, int step) {
    Index index;
    for (int word = 0; word < 4; ++word)
      for (int j = 0; j < 4; ++j)
        index.at[4 * word + j] = static_cast<uint8_t>(4 * (word / 2 * 2 + j / 2) +
                                                      (metadata[word / 2 * 8 + 2 * step + word % 2] >> (2 * j) & 3));
    return index;
  }
  static Weights weights(const uint8_t* bytes) {
    Weights out;
    std::memcpy(out.value, bytes, sizeof out.value);
    return out;
  }
  template <int kHigh>
  static Weights codes(const uint8_t* bytes) {
    Weights out;
    for (int i = 0; i < 16; ++i) out.value[i] = kCodebook[bytes[i] >> (4 * kHigh) & 15];
    return out;
  }
  static Ints start(Ints sums, const Weights&) { return sums; }
  static Ints difference(Ints a, const Ints& b) {
    for (int i = 0; i < 4; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Ints dot(Ints sums, const uint8_t* x, const Index& index, const Weights& w) {
    for (int i = 0; i < 16; ++i) sums.lane[i / 4] += static_cast<int8_t>(x[index.at[i]]) * w.value[i];
    return sums;
  }
  static Floats splat(float value) { return {{value, value, value, value}}; }
  static Floats pair_scale(const uint16_t* scales, int pair) {
    const float a = BFloat16::to_float(scales[2 * pair]), b = BFloat16::to_float(scales[2 * pair + 1]);
    return {{a, b, a, b}};
  }
  static Floats times(Floats a, float b) {
    for (float& lane : a.lane) lane *= b;
    return a;
  }
  static Floats add_scaled(Floats sum, const Ints& ints, const Floats& scale) {
    for (int i = 0; i < 4; ++i) sum.lane[i] += static_cast<float>(ints.lane[i]) * scale.lane[i];
    return sum;
  }
  static void rows(const Floats (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; ++p)
      for (int odd = 0; odd < 2; ++odd) out[2 * p + odd] = sum[p].lane[odd] + sum[p].lane[2 + odd];
  }
};

}  // namespace

const QuantKernel kQuantGeneric{quantize<Vector>, multiply<Vector>};

}  // namespace swiftprune
