// AVX2 + F16C: eight weights, two groups, one byte of metadata per step. Compression goes through byte shuffles.
// Each function returns how many groups of the row it did; it stops early at a fault, which the scalar twin then finds.
#include <immintrin.h>

#include "group.h"

namespace swiftprune {
namespace {

// For each set of stored positions in two groups (two per group): the shuffle that moves them to the front.
struct Shuffles {
  alignas(16) uint8_t bytes16[256][16]{};   // pshufb on eight 16-bit lanes; lower 8 bytes used
  alignas(32) uint32_t lanes32[256][4]{};   // vpermd indices of the four stored 32-bit lanes
};

constexpr Shuffles make_shuffles() {
  Shuffles s;
  for (int set = 0; set < 256; ++set) {
    int out = 0;
    for (int i = 0; i < 8 && out < 4; ++i) {
      if (!(set >> i & 1)) continue;
      s.bytes16[set][2 * out] = static_cast<uint8_t>(2 * i);
      s.bytes16[set][2 * out + 1] = static_cast<uint8_t>(2 * i + 1);
      s.lanes32[set][out] = static_cast<uint32_t>(i);
      ++out;
    }
  }
  return s;
}
constexpr Shuffles kShuffles = make_shuffles();

inline __m256 lanes(int a, int b, int c, int d) {
  return _mm256_castsi256_ps(_mm256_setr_epi32(a, b, c, d, a, b, c, d));
}

template <int kRotation>
inline __m256 beats(__m256 score, __m256 lower) {
  const __m256 other = _mm256_permute_ps(score, kRotation);
  return _mm256_or_ps(_mm256_cmp_ps(score, other, _CMP_GT_OQ),
                      _mm256_and_ps(lower, _mm256_cmp_ps(score, other, _CMP_EQ_OQ)));
}

// Top two of four = beats at least two of the three others. One bit a lane.
inline unsigned top2(__m256 score) {
  const __m256 a = beats<0x39>(score, lanes(-1, -1, -1, 0)), b = beats<0x4e>(score, lanes(-1, -1, 0, 0)),
               c = beats<0x93>(score, lanes(-1, 0, 0, 0));
  const __m256 two = _mm256_or_ps(_mm256_and_ps(a, b), _mm256_and_ps(c, _mm256_or_ps(a, b)));
  return static_cast<unsigned>(_mm256_movemask_ps(two));
}

inline __m256 magnitude(__m256 w) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), w); }

inline bool all_finite(__m256 abs) {
  return _mm256_movemask_ps(_mm256_cmp_ps(abs, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ)) == 0xff;
}

inline unsigned nonzero(__m256 abs) {
  return static_cast<unsigned>(
      ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_castps_si256(abs), _mm256_setzero_si256()))) &
      0xff);
}

struct RowFactors {
  const Factors& f;
  __m256 row, curvature;
  RowFactors(const Factors& factors, int64_t n)
      : f(factors),
        row(_mm256_set1_ps(factors.row ? factors.row[n] : 0.0f)),
        curvature(_mm256_set1_ps(factors.curvature ? factors.curvature[n] : 0.0f)) {}

  inline __m256 score(__m256 abs, int64_t k) const {
    __m256 scale = _mm256_loadu_ps(f.column + k);
    if (f.row) scale = _mm256_add_ps(scale, _mm256_mul_ps(row, _mm256_loadu_ps(f.cross + k)));
    __m256 v = _mm256_mul_ps(abs, scale);
    if (f.curvature) {
      v = _mm256_mul_ps(v, v);
      v = _mm256_mul_ps(v, _mm256_sub_ps(_mm256_set1_ps(1.0f), _mm256_mul_ps(curvature, v)));
    }
    const __m256 zero = _mm256_cmp_ps(abs, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return _mm256_blendv_ps(v, _mm256_set1_ps(kScoreOfZero), zero);
  }
};

// Eight weights in a register, as they are stored (`raw`) and as floats.
template <class T>
struct Eight {  // 16-bit types
  __m128i raw;
  explicit Eight(const uint16_t* w) : raw(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))) {}
  __m256 abs() const { return magnitude(widen(T{})); }
  __m256 widen(BFloat16) const { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)); }
  __m256 widen(Float16) const { return _mm256_cvtph_ps(raw); }

  void store(unsigned kept, unsigned stored, uint16_t* values) const {
    const __m128i bits = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
    const __m128i mask = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(static_cast<short>(kept)), bits), bits);
    const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.bytes16[stored]));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(values), _mm_shuffle_epi8(_mm_and_si128(raw, mask), shuffle));
  }
};

template <>
struct Eight<Float32> {
  __m256i raw;
  explicit Eight(const uint32_t* w) : raw(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))) {}
  __m256 abs() const { return magnitude(_mm256_castsi256_ps(raw)); }

  void store(unsigned kept, unsigned stored, uint32_t* values) const {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(kept)), bits), bits);
    const __m256i index =
        _mm256_castsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.lanes32[stored])));
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_and_si256(raw, mask), index);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm256_castsi256_si128(packed));
  }
};

template <class T>
struct Avx2 {
  using Bits = typename T::Bits;
  static constexpr int64_t kStep = 8;

  static int64_t prune_pack(const Bits* weight, int64_t n, int64_t cols, const Factors& f, Bits* values,
                            uint8_t* metadata) {
    const RowFactors factors(f, n);
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const Eight<T> w(weight + k);
      const __m256 abs = w.abs();
      if (!all_finite(abs)) break;
      const unsigned kept = top2(factors.score(abs, k)) & nonzero(abs);
      metadata[k / 8] = kPairs.metadata[kept];
      w.store(kept, kPairs.stored[kept], values + k / 2);
    }
    return k / kGroup;
  }

  static int64_t pack(const Bits* weight, int64_t cols, Bits* values, uint8_t* metadata) {
    int64_t k = 0;
    for (; k + kStep <= cols; k += kStep) {
      const Eight<T> w(weight + k);
      const __m256 abs = w.abs();
      const unsigned kept = nonzero(abs);
      if (!all_finite(abs) || !kNibble[kept & 15] || !kNibble[kept >> 4]) break;
      metadata[k / 8] = kPairs.metadata[kept];
      w.store(kept, kPairs.stored[kept], values + k / 2);
    }
    return k / kGroup;
  }

  // Expanding by shuffles gains nothing over the scalar twin, which is bound by its stores.
  static int64_t unpack(const Bits*, const uint8_t*, int64_t, Bits*) { return 0; }
};

}  // namespace

const Kernels kAvx2Kernels = Table<Avx2>::kernels;

}  // namespace swiftprune
