#include <arm_neon.h>

#include <type_traits>

#include "quantized_kernel.h"

namespace swiftprune {
namespace {

// A step is a lane: `tbl` picks the inputs of two rows, and `sdot` multiplies 16 of them.
struct Vector {
  static constexpr int kLanes = 1;
  static constexpr int kTokens = 3;
  static constexpr int kOffset = 0;
  using Index = uint8x16_t;
  using Weights = int8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;

  static int32x4_t zero() { return vdupq_n_s32(0); }
  static float32x4_t zero_floats() { return vdupq_n_f32(0); }
  static uint8x16_t index(const uint8_t* metadata, int step) {
    static constexpr uint8_t kCopy[16] = {0, 0, 0, 0, 1, 1, 1, 1, 8, 8, 8, 8, 9, 9, 9, 9};
    static constexpr int8_t kShift[16] = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
    static constexpr uint8_t kGroup4[16] = {0, 0, 4, 4, 0, 0, 4, 4, 8, 8, 12, 12, 8, 8, 12, 12};
    const uint8x16_t copy = vaddq_u8(vld1q_u8(kCopy), vdupq_n_u8(static_cast<uint8_t>(2 * step)));
    const uint8x16_t same = vqtbl1q_u8(vld1q_u8(metadata), copy);
    return vorrq_u8(vandq_u8(vshlq_u8(same, vld1q_s8(kShift)), vdupq_n_u8(3)), vld1q_u8(kGroup4));
  }
  static int8x16_t weights(const uint8_t* bytes) { return vreinterpretq_s8_u8(vld1q_u8(bytes)); }
  template <int kHigh>
  static int8x16_t codes(const uint8_t* bytes) {
    const uint8x16_t both = vld1q_u8(bytes);
    return vqtbl1q_s8(vld1q_s8(kCodebook), kHigh ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15)));
  }
  static int32x4_t start(int32x4_t sums, int8x16_t) { return sums; }
  static int32x4_t difference(int32x4_t a, int32x4_t b) { return vsubq_s32(a, b); }
  static int32x4_t dot(int32x4_t sums, const uint8_t* x, uint8x16_t index, int8x16_t w) {
    return vdotq_s32(sums, vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(x), index)), w);
  }
  static float32x4_t splat(float value) { return vdupq_n_f32(value); }
  static float32x4_t pair_scale(const uint16_t* scales, int pair) {
    const float both[2] = {BFloat16::to_float(scales[2 * pair]), BFloat16::to_float(scales[2 * pair + 1])};
    const float32x2_t half = vld1_f32(both);
    return vcombine_f32(half, half);
  }
  static float32x4_t times(float32x4_t a, float b) { return vmulq_n_f32(a, b); }
  static float32x4_t add_scaled(float32x4_t sum, int32x4_t ints, float32x4_t scale) {
    return vfmaq_f32(sum, vcvtq_f32_s32(ints), scale);
  }
  static void rows(const float32x4_t (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; ++p) vst1_f32(out + 2 * p, vadd_f32(vget_low_f32(sum[p]), vget_high_f32(sum[p])));
  }
};

}  // namespace

const QuantKernel kQuantNeonDotprod{quantize<Vector>, multiply<Vector>};

}  // namespace swiftprune
