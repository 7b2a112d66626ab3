#include "quantized_avx2_kernel.h"

namespace swiftprune {
namespace {

struct Product {
  static constexpr int kOffset = 0;
  // `vpmaddubsw` takes one factor for unsigned and saturates at 16 bits: |w| and x with w's sign stay below, at 127.
  static __m256i add(__m256i sums, __m256i x, __m256i w) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

const QuantKernel kQuantAvx2{quantize<Vector256<Product>>, multiply<Vector256<Product>>};

}  // namespace swiftprune
