// AVX-512 (F, BW, DQ, VL, VBMI2): 32 weights of 16 bits, or 16 of 32 bits, per step.
// Each function returns how many groups of the row it did; it stops early at a fault, which the scalar twin then finds.
#include <immintrin.h>

#include "group.h"

namespace swiftprune {
namespace {

// Lanes whose index within their group of four is lower than that of the lane `r` places further (cyclically).
constexpr __mmask16 kLower1 = 0x7777, kLower2 = 0x3333, kLower3 = 0x1111;

template <int kRotation>
inline __mmask16 beats(__m512 score, __mmask16 lower) {
  const __m512 other = _mm512_permute_ps(score, kRotation);
  return _mm512_cmp_ps_mask(score, other, _CMP_GT_OQ) | _mm512_mask_cmp_ps_mask(lower, score, other, _CMP_EQ_OQ);
}

// Top two of four = beats at least two of the three others.
inline __mmask16 top2(__m512 score) {
  const __mmask16 a = beats<0x39>(score, kLower1), b = beats<0x4e>(score, kLower2), c = beats<0x93>(score, kLower3);
  return (a & b) | (c & (a | b));
}

inline __m512 magnitude(__m512 w) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), w); }

inline bool all_finite(__m512 abs) {
  return _mm512_cmp_ps_mask(abs, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ) == 0xffff;
}

struct RowFactors {
  const Factors& f;
  __m512 row, curvature;
  RowFactors(const Factors& factors, int64_t n)
      : f(factors),
        row(_mm512_set1_ps(factors.row ? factors.row[n] : 0.0f)),
        curvature(_mm512_set1_ps(factors.curvature ? factors.curvature[n] : 0.0f)) {}

  inline __m512 score(__m512 abs, int64_t k) const {
    __m512 scale = _mm512_loadu_ps(f.column + k);
    if (f.row) scale = _mm512_add_ps(scale, _mm512_mul_ps(row, _mm512_loadu_ps(f.cross + k)));
    __m512 v = _mm512_mul_ps(abs, scale);
    if (f.curvature) {
      v = _mm512_mul_ps(v, v);
      v = _mm512_mul_ps(v, _mm512_sub_ps(_mm512_set1_ps(1.0f), _mm512_mul_ps(curvature, v)));
    }
    return v;
  }
};

inline __m512 widen(__m256i raw, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline __m512 widen(__m256i raw, Float16) { return _mm512_cvtph_ps(raw); }

// From the set of kept non-zero positions to what is stored; four bytes, eight groups.
inline uint32_t stored_of(uint32_t kept, uint8_t* metadata) {
  uint32_t stored = 0;
  for (int i = 0; i < 4; ++i) {
    const uint8_t set = static_cast<uint8_t>(kept >> (8 * i));
    metadata[i] = kPairs.metadata[set];
    stored |= static_cast<uint32_t>(kPairs.stored[set]) << (8 * i);
  }
  return stored;
}
inline uint16_t stored_of(uint16_t kept, uint8_t* metadata) {
  uint16_t stored = 0;
  for (int i = 0; i < 2; ++i) {
    const uint8_t set = static_cast<uint8_t>(kept >> (8 * i));
    metadata[i] = kPairs.metadata[set];
    stored |= static_cast<uint16_t>(kPairs.stored[set] << (8 * i));
  }
  return stored;
}

// At most two bits in every nibble.
inline bool at_most_two(uint32_t set) {
  const uint32_t pairs = set - ((set >> 1) & 0x55555555u);
  const uint32_t counts = (pairs & 0x33333333u) + ((pairs >> 2) & 0x33333333u);
  return ((counts + 0x55555555u) & 0x88888888u) == 0;  // 3 + 5 sets the top bit of a nibble
}

inline bool expand_masks(const uint8_t* metadata, int bytes, uint32_t* positions) {
  uint32_t set = 0;
  bool valid = true;
  for (int i = 0; i < bytes; ++i) {
    set |= static_cast<uint32_t>(kPairs.positions[metadata[i]]) << (8 * i);
    valid &= kPairs.valid[metadata[i]];
  }
  *positions = set;
  return valid;
}

template <class T>
struct Avx512 {  // 16-bit types
  using Bits = uint16_t;
  static constexpr int64_t kStep = 32;

  static int64_t prune_pack(const Bits* weight, int64_t n, int64_t cols, const Factors& f, Bits* values,
                            uint8_t* metadata) {
    const RowFactors factors(f, n);
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const __m512i raw = _mm512_loadu_si512(weight + k);
      const __m512 low = magnitude(widen(_mm512_castsi512_si256(raw), T{}));
      const __m512 high = magnitude(widen(_mm512_extracti64x4_epi64(raw, 1), T{}));
      if (!all_finite(low) || !all_finite(high)) break;
      const __mmask32 top = static_cast<__mmask32>(top2(factors.score(low, k))) |
                            static_cast<__mmask32>(top2(factors.score(high, k + 16))) << 16;
      const __mmask32 kept = top & _mm512_test_epi16_mask(raw, _mm512_set1_epi16(0x7fff));
      const __mmask32 stored = stored_of(static_cast<uint32_t>(kept), metadata + k / 8);
      const __m512i packed = _mm512_maskz_compress_epi16(stored, _mm512_maskz_mov_epi16(kept, raw));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + k / 2), _mm512_castsi512_si256(packed));
    }
    return k / kGroup;
  }

  static int64_t pack(const Bits* weight, int64_t cols, Bits* values, uint8_t* metadata) {
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const __m512i raw = _mm512_loadu_si512(weight + k);
      const __m512 low = magnitude(widen(_mm512_castsi512_si256(raw), T{}));
      const __m512 high = magnitude(widen(_mm512_extracti64x4_epi64(raw, 1), T{}));
      const __mmask32 kept = _mm512_test_epi16_mask(raw, _mm512_set1_epi16(0x7fff));
      if (!all_finite(low) || !all_finite(high) || !at_most_two(kept)) break;
      const __mmask32 stored = stored_of(static_cast<uint32_t>(kept), metadata + k / 8);
      const __m512i packed = _mm512_maskz_compress_epi16(stored, _mm512_maskz_mov_epi16(kept, raw));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + k / 2), _mm512_castsi512_si256(packed));
    }
    return k / kGroup;
  }

  static int64_t unpack(const Bits* values, const uint8_t* metadata, int64_t cols, Bits* weight) {
    int64_t k = 0;
    uint32_t positions;
    for (; k + kStep <= cols; k += kStep) {
      if (!expand_masks(metadata + k / 8, 4, &positions)) break;
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + k / 2));
      _mm512_storeu_si512(weight + k, _mm512_maskz_expand_epi16(positions, _mm512_castsi256_si512(packed)));
    }
    return k / kGroup;
  }
};

template <>
struct Avx512<Float32> {
  using Bits = uint32_t;
  static constexpr int64_t kStep = 16;

  static int64_t prune_pack(const Bits* weight, int64_t n, int64_t cols, const Factors& f, Bits* values,
                            uint8_t* metadata) {
    const RowFactors factors(f, n);
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const __m512i raw = _mm512_loadu_si512(weight + k);
      const __m512 abs = magnitude(_mm512_castsi512_ps(raw));
      if (!all_finite(abs)) break;
      const __mmask16 kept =
          top2(factors.score(abs, k)) & _mm512_test_epi32_mask(raw, _mm512_set1_epi32(0x7fffffff));
      const __mmask16 stored = stored_of(static_cast<uint16_t>(kept), metadata + k / 8);
      const __m512i packed = _mm512_maskz_compress_epi32(stored, _mm512_maskz_mov_epi32(kept, raw));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + k / 2), _mm512_castsi512_si256(packed));
    }
    return k / kGroup;
  }

  static int64_t pack(const Bits* weight, int64_t cols, Bits* values, uint8_t* metadata) {
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const __m512i raw = _mm512_loadu_si512(weight + k);
      const __mmask16 kept = _mm512_test_epi32_mask(raw, _mm512_set1_epi32(0x7fffffff));
      if (!all_finite(magnitude(_mm512_castsi512_ps(raw))) || !at_most_two(kept)) break;
      const __mmask16 stored = stored_of(static_cast<uint16_t>(kept), metadata + k / 8);
      const __m512i packed = _mm512_maskz_compress_epi32(stored, _mm512_maskz_mov_epi32(kept, raw));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + k / 2), _mm512_castsi512_si256(packed));
    }
    return k / kGroup;
  }

  static int64_t unpack(const Bits* values, const uint8_t* metadata, int64_t cols, Bits* weight) {
    int64_t k = 0;
    uint32_t positions;
    for (; k + kStep <= cols; k += kStep) {
      if (!expand_masks(metadata + k / 8, 2, &positions)) break;
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + k / 2));
      _mm512_storeu_si512(weight + k, _mm512_maskz_expand_epi32(static_cast<__mmask16>(positions),
                                                                _mm512_castsi256_si512(packed)));
    }
    return k / kGroup;
  }
};

}  // namespace

const Kernels kAvx512Kernels = Table<Avx512>::kernels;

}  // namespace swiftprune
