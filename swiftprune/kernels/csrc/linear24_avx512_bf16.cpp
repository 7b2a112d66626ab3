#include <immintrin.h>

#include "linear24_kernel.h"

namespace swiftprune {
namespace {

// One permute serves two rows: lanes hold [A0 A1 B0 B1] of eight groups, and `vdpbf16ps` adds up neighbours.
struct Vector {
  using Storage = BFloat16;
  using Input = uint16_t;
  static constexpr int kInputs = 32;
  static constexpr int kTokens = 6;
  static constexpr int kTileTokens = 5;
  static constexpr bool kInPlace = true;
  using Sum = __m512;
  using Index = __m512i;
  using Values = __m512i;

  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512i words(uint64_t metadata) { return _mm512_set1_epi64(static_cast<int64_t>(metadata)); }
  static __m512i index(__m512i words, int) {
    const __m512i shift = _mm512_set_epi16(14, 14, 14, 14, 12, 12, 12, 12, 10, 10, 10, 10, 8, 8, 8, 8, 6, 6, 6, 6, 4, 4,
                                           4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    const __m512i base = _mm512_slli_epi16(shift, 1);
    constexpr int kAAndBOrC = 0xEA;
    return _mm512_ternarylogic_epi32(_mm512_srlv_epi16(words, shift), _mm512_set1_epi16(3), base, kAAndBOrC);
  }
  static __m512i load(const uint16_t* values) { return _mm512_loadu_si512(values); }
  static __m512 dot(__m512 sum, __m512i index, __m512i x, __m512i values) {
    const __m512i own = _mm512_permutexvar_epi16(index, x);
    return _mm512_dpbf16_ps(sum, (__m512bh)own, (__m512bh)values);
  }
  static __m128 fold(__m512 sum) {  // [A B] x 8 -> [A B A B]
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static void rows(const __m512 (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; p += 2) {
      const __m128 a = fold(sum[p]), b = fold(sum[p + 1]);
      _mm_storeu_ps(out + 2 * p, _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)));
    }
  }
  static __m512i inputs(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static void widen(const uint16_t* x, uint16_t* out) { _mm512_storeu_si512(out, _mm512_loadu_si512(x)); }
  static void store(const float* sums, uint16_t* y, int64_t count) {
    const __m128i rounded = (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(sums));
    _mm_mask_storeu_epi16(y, static_cast<__mmask8>((1u << count) - 1), rounded);
  }
};

}  // namespace
}  // namespace swiftprune

extern "C" void swiftprune_linear24_avx512_bf16(const swiftprune_linear24_args* args, int64_t first, int64_t last) {
  swiftprune::Linear24<swiftprune::Vector>::run(*args, first, last);
}
