// The float types of weights, as bits and as numbers.
// Everything is in an anonymous namespace, so that no file can pick up code compiled for another file's ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace swiftprune {
namespace {

struct Float32 {
  using Bits = uint32_t;
  static float to_float(Bits b) {
    float f;
    std::memcpy(&f, &b, sizeof f);
    return f;
  }
  static Bits from_float(float f) {
    Bits b;
    std::memcpy(&b, &f, sizeof b);
    return b;
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static float to_float(Bits b) { return Float32::to_float(static_cast<uint32_t>(b) << 16); }
  static Bits from_float(float f) {  // to nearest, ties to even; a NaN stays one
    const uint32_t b = Float32::from_float(f);
    return static_cast<Bits>(f != f ? b >> 16 | 0x40u : (b + 0x7fffu + (b >> 16 & 1u)) >> 16);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static float to_float(Bits b) {
    const uint32_t sign = (b & 0x8000u) << 16, exponent = (b >> 10) & 31u, fraction = b & 0x3ffu;
    if (exponent == 31) return Float32::to_float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return Float32::to_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // subnormal or zero
    return sign ? -magnitude : magnitude;
  }
  static Bits from_float(float f) {  // to nearest, ties to even; a NaN stays one
    const uint32_t b = Float32::from_float(f), sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<Bits>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<Bits>(sign | 0x7c00u);  // 65520 and above
    if (magnitude < 0x38800000u)                                             // below 2^-14: the FPU rounds
      return static_cast<Bits>(sign | (Float32::from_float(Float32::to_float(magnitude) + 0.5f) - 0x3f000000u));
    return static_cast<Bits>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
  }
};

}  // namespace
}  // namespace swiftprune
