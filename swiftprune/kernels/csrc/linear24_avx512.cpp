#include <immintrin.h>

#include "linear24_kernel.h"

namespace swiftprune {
namespace {

template <class T>
__m512 to_float(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (std::is_same_v<T, Float16>) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Sums in fp32. A 128-bit quarter holds one group, [A0 A1 B0 B1], and `vpermilps` selects inside quarters.
template <class T>
struct Vector {
  using Storage = T;
  using Bits = typename T::Bits;
  using Input = float;
  static constexpr bool kInPlace = std::is_same_v<T, Float32>;
  static constexpr int kInputs = 16;
  static constexpr int kTokens = 6;
  static constexpr int kTileTokens = 4;
  using Sum = __m512;
  using Index = __m512i;
  using Values = __m512;

  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512i words(uint64_t metadata) {
    return _mm512_cvtepu16_epi32(_mm256_set1_epi64x(static_cast<int64_t>(metadata)));
  }
  static __m512i index(__m512i words, int step) {
    const __m512i shift = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    return _mm512_srlv_epi32(words, _mm512_add_epi32(shift, _mm512_set1_epi32(8 * step)));
  }
  static __m512 load(const Bits* values) {
    if constexpr (kInPlace) return _mm512_loadu_ps(values);
    else return to_float<T>(values);
  }
  static __m512 inputs(const float* x) { return _mm512_loadu_ps(x); }
  static __m512 dot(__m512 sum, __m512i index, __m512 x, __m512 values) {
    return _mm512_fmadd_ps(_mm512_permutevar_ps(x, index), values, sum);
  }
  static __m128 fold(__m512 sum) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static void rows(const __m512 (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; p += 2) _mm_storeu_ps(out + 2 * p, _mm_hadd_ps(fold(sum[p]), fold(sum[p + 1])));
  }
  static void widen(const Bits* x, float* out) { _mm512_storeu_ps(out, load(x)); }
  static void store(const float* sums, Bits* y, int64_t count) { store_rounded<T>(sums, y, count); }
};

}  // namespace
}  // namespace swiftprune

extern "C" void swiftprune_linear24_avx512(const swiftprune_linear24_args* args, int64_t first, int64_t last) {
  swiftprune::run_linear24<swiftprune::Vector>(*args, first, last);
}
