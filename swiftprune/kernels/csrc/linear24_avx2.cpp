#include <immintrin.h>

#include "linear24_kernel.h"

namespace swiftprune {
namespace {

template <class T>
__m256 to_float(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (std::is_same_v<T, Float16>) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// As in linear24_avx512.cpp with half the width: two groups, [A0 A1 B0 B1] each.
template <class T>
struct Vector {
  using Storage = T;
  using Bits = typename T::Bits;
  using Input = float;
  static constexpr bool kInPlace = std::is_same_v<T, Float32>;
  static constexpr int kInputs = 8;
  static constexpr int kTokens = 3;
  static constexpr int kTileTokens = 3;
  using Sum = __m256;
  using Index = __m256i;
  using Values = __m256;

  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256i words(uint64_t metadata) {
    return _mm256_cvtepu16_epi32(_mm_set1_epi64x(static_cast<int64_t>(metadata)));
  }
  static __m256i index(__m256i words, int step) {
    const __m256i shift = _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0);
    return _mm256_srlv_epi32(words, _mm256_add_epi32(shift, _mm256_set1_epi32(4 * step)));
  }
  static __m256 load(const Bits* values) {
    if constexpr (kInPlace) return _mm256_loadu_ps(reinterpret_cast<const float*>(values));
    else return to_float<T>(values);
  }
  static __m256 inputs(const float* x) { return _mm256_loadu_ps(x); }
  static __m256 dot(__m256 sum, __m256i index, __m256 x, __m256 values) {
    return _mm256_fmadd_ps(_mm256_permutevar_ps(x, index), values, sum);
  }
  static __m128 fold(__m256 sum) { return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)); }
  static void rows(const __m256 (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; p += 2) _mm_storeu_ps(out + 2 * p, _mm_hadd_ps(fold(sum[p]), fold(sum[p + 1])));
  }
  static void widen(const Bits* x, float* out) { _mm256_storeu_ps(out, load(x)); }
  static void store(const float* sums, Bits* y, int64_t count) { store_rounded<T>(sums, y, count); }
};

}  // namespace
}  // namespace swiftprune

extern "C" void swiftprune_linear24_avx2(const swiftprune_linear24_args* args, int64_t first, int64_t last) {
  swiftprune::run_linear24<swiftprune::Vector>(*args, first, last);
}
