#include "quantized_avx2_kernel.h"

namespace swiftprune {
namespace {

struct Product {
  static constexpr int kOffset = 128;
  static __m256i add(__m256i sums, __m256i x, __m256i w) { return _mm256_dpbusd_avx_epi32(sums, x, w); }
};

}  // namespace

const QuantKernel kQuantAvxVnni{quantize<Vector256<Product>>, multiply<Vector256<Product>>};

}  // namespace swiftprune
