// The vector operations of 256 bits, with and without the dot product instruction of AVX-VNNI.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "quantized_kernel.h"

namespace swiftprune {
namespace {

template <class Product>
struct Vector256 {
  static constexpr int kLanes = 2;
  static constexpr int kTokens = 2;
  static constexpr int kOffset = Product::kOffset;
  using Index = __m256i;
  using Weights = __m256i;
  using Ints = __m256i;
  using Floats = __m256;

  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256 zero_floats() { return _mm256_setzero_ps(); }
  static __m256i index(const uint8_t* metadata, int step) {
    // A byte of metadata holds the positions of a 32-bit word of inputs: it is copied four times, and shifted.
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata));
    const __m256i copy = _mm256_add_epi8(
        _mm256_set_epi32(0x0b0b0b0b, 0x0a0a0a0a, 0x03030303, 0x02020202, 0x09090909, 0x08080808, 0x01010101, 0),
        _mm256_set1_epi8(static_cast<char>(4 * step)));
    const __m256i same = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), copy);
    const __m256i spread = _mm256_or_si256(
        _mm256_or_si256(_mm256_and_si256(same, _mm256_set1_epi32(0x00000003)),
                        _mm256_and_si256(_mm256_srli_epi32(same, 2), _mm256_set1_epi32(0x00000300))),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(same, 4), _mm256_set1_epi32(0x00030000)),
                        _mm256_and_si256(_mm256_srli_epi32(same, 6), _mm256_set1_epi32(0x03000000))));
    const __m256i group = _mm256_set_epi32(0x0c0c0808, 0x0c0c0808, 0x04040000, 0x04040000, 0x0c0c0808, 0x0c0c0808,
                                           0x04040000, 0x04040000);
    return _mm256_or_si256(spread, group);
  }
  static __m256i weights(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
  template <int kHigh>
  static __m256i codes(const uint8_t* bytes) {
    const __m256i book = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodebook)));
    __m256i both = weights(bytes);
    if constexpr (kHigh) both = _mm256_srli_epi16(both, 4);
    return _mm256_shuffle_epi8(book, _mm256_and_si256(both, _mm256_set1_epi8(15)));
  }
  static __m256i start(__m256i sums, __m256i w) {
    if constexpr (kOffset) return Product::add(sums, _mm256_set1_epi8(-128), w);
    return sums;
  }
  static __m256i difference(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
  static __m256i dot(__m256i sums, const uint8_t* x, __m256i index, __m256i w) {
    return Product::add(sums, _mm256_shuffle_epi8(weights(x), index), w);
  }
  static __m256 splat(float value) { return _mm256_set1_ps(value); }
  static __m256 pair_scale(const uint16_t* scales, int pair) {
    uint32_t both;
    std::memcpy(&both, scales + 2 * pair, sizeof both);
    const __m256i words = _mm256_set1_epi64x(static_cast<int64_t>((both & 0xffffull) << 16 | (both & 0xffff0000ull) << 32));
    return _mm256_castsi256_ps(words);
  }
  static __m256 times(__m256 a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
  static __m256 add_scaled(__m256 sum, __m256i ints, __m256 scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints), scale, sum);
  }
  static __m128 fold(__m256 sum) { return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)); }
  static void rows(const __m256 (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; p += 2) {
      const __m128 first = fold(sum[p]), second = fold(sum[p + 1]);
      _mm_storeu_ps(out + 2 * p, _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first)));
    }
  }
};

}  // namespace
}  // namespace swiftprune
