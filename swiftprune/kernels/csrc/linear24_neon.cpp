#include <arm_neon.h>

#include "linear24_kernel.h"

namespace swiftprune {
namespace {

// One group of four inputs for two rows, [A0 A1 B0 B1]: `tbl` looks up whole floats by their four bytes.
template <class T>
struct Vector {
  using Storage = T;
  using Bits = typename T::Bits;
  using Input = float;
  static constexpr bool kInPlace = std::is_same_v<T, Float32>;
  static constexpr int kInputs = kGroup;
  static constexpr int kTokens = 4;
  static constexpr int kTileTokens = 4;
  using Sum = float32x4_t;
  using Index = uint8x16_t;
  using Values = float32x4_t;

  static Sum zero() { return vdupq_n_f32(0); }
  static uint32x4_t words(uint64_t metadata) { return vmovl_u16(vcreate_u16(metadata)); }
  static Index index(uint32x4_t words, int step) {
    const uint32x4_t position = vandq_u32(vshlq_u32(words, vdupq_n_s32(-2 * step)), vdupq_n_u32(3));
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), position, vdupq_n_u32(0x04040404)));
  }
  static Values load(const Bits* values) {
    if constexpr (kInPlace) return vld1q_f32(reinterpret_cast<const float*>(values));
    else if constexpr (std::is_same_v<T, Float16>) return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(values)));
    else return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(values), 16));
  }
  static float32x4_t inputs(const float* x) { return vld1q_f32(x); }
  static Sum dot(Sum sum, Index index, float32x4_t x, Values values) {
    return vfmaq_f32(sum, vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), index)), values);
  }
  static void rows(const Sum (&sum)[kRowPairs], float* out) {
    for (int p = 0; p < kRowPairs; p += 2) vst1q_f32(out + 2 * p, vpaddq_f32(sum[p], sum[p + 1]));
  }
  static void widen(const Bits* x, float* out) { vst1q_f32(out, load(x)); }
  static void store(const float* sums, Bits* y, int64_t count) { store_rounded<T>(sums, y, count); }
};

}  // namespace
}  // namespace swiftprune

extern "C" void swiftprune_linear24_neon(const swiftprune_linear24_args* args, int64_t first, int64_t last) {
  swiftprune::run_linear24<swiftprune::Vector>(*args, first, last);
}
