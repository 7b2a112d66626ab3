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
    const __mmask16 zero = _mm512_cmp_ps_mask(abs, _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(v, zero, _mm512_set1_ps(kScoreOfZero));
  }
};

inline __m512 widen(__m256i raw, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline __m512 widen(__m256i raw, Float16) { return _mm512_cvtph_ps(raw); }

// From the set of kept non-zero positions of `kWeights` weights: their metadata, and the set that is stored.
template <int64_t kWeights>
uint32_t stored_of(uint32_t kept, uint8_t* metadata) {
  uint32_t stored = 0;
  for (int i = 0; i < kWeights / 8; ++i) {
    const uint8_t set = static_cast<uint8_t>(kept >> (8 * i));
    metadata[i] = kPairs.metadata[set];
    stored |= static_cast<uint32_t>(kPairs.stored[set]) << (8 * i);
  }
  return stored;
}

// At most two bits in every nibble.
inline bool at_most_two(uint32_t set) {
  const uint32_t pairs = set - ((set >> 1) & 0x55555555u);
  const uint32_t counts = (pairs & 0x33333333u) + ((pairs >> 2) & 0x33333333u);
  return ((counts + 0x55555555u) & 0x88888888u) == 0;  // 3 + 5 sets the top bit of a nibble
}

// The set of stored positions that `kWeights` weights' metadata names; false when a nibble is invalid.
template <int64_t kWeights>
bool positions_of(const uint8_t* metadata, uint32_t* positions) {
  uint32_t set = 0;
  bool valid = true;
  for (int i = 0; i < kWeights / 8; ++i) {
    set |= static_cast<uint32_t>(kPairs.positions[metadata[i]]) << (8 * i);
    valid &= kPairs.valid[metadata[i]];
  }
  *positions = set;
  return valid;
}

// One register of weights; its sets have one bit a weight.
template <class T>
struct Weights {  // 16-bit types
  static constexpr int64_t kCount = 32;
  __m512i raw;
  __m512 low, high;  // magnitudes as floats
  explicit Weights(const uint16_t* w)
      : raw(_mm512_loadu_si512(w)),
        low(magnitude(widen(_mm512_castsi512_si256(raw), T{}))),
        high(magnitude(widen(_mm512_extracti64x4_epi64(raw, 1), T{}))) {}

  bool finite() const { return all_finite(low) && all_finite(high); }
  uint32_t nonzero() const { return _mm512_test_epi16_mask(raw, _mm512_set1_epi16(0x7fff)); }
  uint32_t top(const RowFactors& factors, int64_t k) const {
    return static_cast<uint32_t>(top2(factors.score(low, k))) |
           static_cast<uint32_t>(top2(factors.score(high, k + 16))) << 16;
  }
  void store(uint32_t kept, uint32_t stored, uint16_t* values) const {
    const __m512i packed = _mm512_maskz_compress_epi16(stored, _mm512_maskz_mov_epi16(kept, raw));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm512_castsi512_si256(packed));
  }
  static void expand(const uint16_t* values, uint32_t positions, uint16_t* w) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    _mm512_storeu_si512(w, _mm512_maskz_expand_epi16(positions, _mm512_castsi256_si512(packed)));
  }
};

template <>
struct Weights<Float32> {
  static constexpr int64_t kCount = 16;
  __m512i raw;
  explicit Weights(const uint32_t* w) : raw(_mm512_loadu_si512(w)) {}

  __m512 abs() const { return magnitude(_mm512_castsi512_ps(raw)); }
  bool finite() const { return all_finite(abs()); }
  uint32_t nonzero() const { return _mm512_test_epi32_mask(raw, _mm512_set1_epi32(0x7fffffff)); }
  uint32_t top(const RowFactors& factors, int64_t k) const { return top2(factors.score(abs(), k)); }
  void store(uint32_t kept, uint32_t stored, uint32_t* values) const {
    const __m512i masked = _mm512_maskz_mov_epi32(static_cast<__mmask16>(kept), raw);
    const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(stored), masked);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm512_castsi512_si256(packed));
  }
  static void expand(const uint32_t* values, uint32_t positions, uint32_t* w) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    _mm512_storeu_si512(w, _mm512_maskz_expand_epi32(static_cast<__mmask16>(positions), _mm512_castsi256_si512(packed)));
  }
};

template <class T>
struct Avx512 {
  using Bits = typename T::Bits;
  static constexpr int64_t kStep = Weights<T>::kCount;

  static int64_t prune_pack(const Bits* weight, int64_t n, int64_t cols, const Factors& f, Bits* values,
                            uint8_t* metadata) {
    const RowFactors factors(f, n);
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const Weights<T> w(weight + k);
      if (!w.finite()) break;
      const uint32_t kept = w.top(factors, k) & w.nonzero();
      w.store(kept, stored_of<kStep>(kept, metadata + k / 8), values + k / 2);
    }
    return k / kGroup;
  }

  static int64_t pack(const Bits* weight, int64_t cols, Bits* values, uint8_t* metadata) {
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const Weights<T> w(weight + k);
      const uint32_t kept = w.nonzero();
      if (!w.finite() || !at_most_two(kept)) break;
      w.store(kept, stored_of<kStep>(kept, metadata + k / 8), values + k / 2);
    }
    return k / kGroup;
  }

  static int64_t unpack(const Bits* values, const uint8_t* metadata, int64_t cols, Bits* weight) {
    int64_t k = 0;
    uint32_t positions;
    for (; k + kStep <= cols && positions_of<kStep>(metadata + k / 8, &positions); k += kStep)
      Weights<T>::expand(values + k / 2, positions, weight + k);
    return k / kGroup;
  }
};

}  // namespace

const Kernels kAvx512Kernels = Table<Avx512>::kernels;

}  // namespace swiftprune
