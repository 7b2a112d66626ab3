#include <immintrin.h>

#include <type_traits>

#include "quantized_kernel.h"

namespace swiftprune {
namespace {

// A step is a half of a chunk: `vpmultishiftqb` spreads its positions, `vpshufb` picks the inputs of two rows, and
// `vpdpbusd` multiplies 64 of them. It takes inputs for unsigned, hence the offset.
struct Vector {
  static constexpr int kLanes = 4;
  static constexpr int kTokens = 4;
  static constexpr int kOffset = 128;
  using Index = __m512i;
  using Weights = __m512i;
  using Ints = __m512i;
  using Floats = __m512;

  static __m512i zero() { return _mm512_setzero_si512(); }
  static __m512 zero_floats() { return _mm512_setzero_ps(); }
  static __m512i index(const uint8_t* metadata, int) {
    // Byte i of 64-bit word q takes its two bits from word q % 2, at 16 (q / 2) + 2 i.
    const __m512i at = _mm512_add_epi8(
        _mm512_set1_epi64(0x0e0c0a0806040200), _mm512_set_epi64(0x3030303030303030, 0x3030303030303030, 0x2020202020202020,
                                                                0x2020202020202020, 0x1010101010101010, 0x1010101010101010, 0, 0));
    const __m512i group = _mm512_set4_epi32(0x0c0c0808, 0x0c0c0808, 0x04040000, 0x04040000);
    const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata)));
    const __m512i spread = _mm512_multishift_epi64_epi8(at, words);
    return _mm512_ternarylogic_epi32(spread, _mm512_set1_epi8(3), group, 0xea);  // spread & 3 | group
  }
  static __m512i weights(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  template <int kHigh>
  static __m512i codes(const uint8_t* bytes) {
    const __m512i book = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodebook)));
    __m512i both = _mm512_loadu_si512(bytes);
    if constexpr (kHigh) both = _mm512_srli_epi16(both, 4);
    return _mm512_shuffle_epi8(book, _mm512_and_si512(both, _mm512_set1_epi8(15)));
  }
  static __m512i start(__m512i sums, __m512i w) { return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(-128), w); }
  static __m512i difference(__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); }
  static __m512i dot(__m512i sums, const uint8_t* x, __m512i index, __m512i w) {
    return _mm512_dpbusd_epi32(sums, _mm512_shuffle_epi8(_mm512_loadu_si512(x), index), w);
  }
  static __m512 splat(float value) { return _mm512_set1_ps(value); }
  static __m512 pair_scale(const uint16_t* scales, int pair) {
    const __m512i wide = _mm512_castsi256_si512(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales))), 16));
    const __m512i pick = _mm512_add_epi32(_mm512_set4_epi32(1, 0, 1, 0), _mm512_set1_epi32(2 * pair));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(pick, wide));
  }
  static __m512 times(__m512 a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
  static __m512 add_scaled(__m512 sum, __m512i ints, __m512 scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), scale, sum);
  }
  // [A B A B] of a pair.
  static __m128 fold(__m512 sum) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static void rows(const __m512 (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; p += 2) {
      const __m128 first = fold(sum[p]), second = fold(sum[p + 1]);
      _mm_storeu_ps(out + 2 * p, _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first)));
    }
  }
};

}  // namespace

const QuantKernel kQuantAvx512Vnni{quantize<Vector>, multiply<Vector>};

}  // namespace swiftprune
