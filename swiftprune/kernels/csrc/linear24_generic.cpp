#include "linear24_kernel.h"

namespace swiftprune {
namespace {

// The scalar twin of the vector kernels, and what runs where there is none: a step is one group, [A0 A1 B0 B1].
template <class T>
struct Vector {
  using Storage = T;
  using Bits = typename T::Bits;
  using Input = float;
  static constexpr bool kInPlace = std::is_same_v<T, Float32>;
  static constexpr int kInputs = kGroup;
  static constexpr int kTokens = 2;
  static constexpr int kTileTokens = 2;
  struct Index {
    uint8_t lane[kGroup];
  };
  struct Sum {
    float lane[kGroup];
  };
  using Values = Sum;

  static Sum zero() { return {}; }
  static uint64_t words(uint64_t metadata) { return metadata; }
  static Index index(uint64_t words, int step) {
    Index index;
    for (int i = 0; i < kGroup; ++i) index.lane[i] = static_cast<uint8_t>(words >> (16 * i + 2 * step) & 3u);
    return index;
  }
  static Sum load(const Bits* values) {
    Sum out;
    for (int i = 0; i < kGroup; ++i) out.lane[i] = T::to_float(values[i]);
    return out;
  }
  static const float* inputs(const float* x) { return x; }
  static Sum dot(Sum sum, const Index& index, const float* x, const Sum& values) {
    for (int i = 0; i < kGroup; ++i) sum.lane[i] += x[index.lane[i]] * values.lane[i];
    return sum;
  }
  static void rows(const Sum (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; ++p) {
      out[2 * p] = sum[p].lane[0] + sum[p].lane[1];
      out[2 * p + 1] = sum[p].lane[2] + sum[p].lane[3];
    }
  }
  static void widen(const Bits* x, float* out) {
    for (int i = 0; i < kInputs; ++i) out[i] = T::to_float(x[i]);
  }
  static void store(const float* sums, Bits* y, int64_t count) { store_rounded<T>(sums, y, count); }
};

}  // namespace
}  // namespace swiftprune

extern "C" void swiftprune_linear24_generic(const swiftprune_linear24_args* args, int64_t first, int64_t last) {
  swiftprune::run_linear24<swiftprune::Vector>(*args, first, last);
}
