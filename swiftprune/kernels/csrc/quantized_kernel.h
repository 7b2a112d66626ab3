// The product with quantized values, written once; each per-ISA file supplies the vector operations as a class V:
//
//   kLanes           16-byte lanes of a register; a half of a chunk is 4 / kLanes steps
//   kTokens          tokens that share a pass over the weight, whose sums fit the registers
//   kOffset          what is added to rounded inputs, so that an instruction takes them for unsigned: 128 or 0
//   Index            where the values of a step find their inputs, each in its own lane; index(metadata, step)
//   Weights          the values of a step: weights(bytes), and codes<high>(bytes) of 4-bit ones
//   dot(Ints, x, Index, Weights)    adds, to each 32-bit sum, four products of picked inputs and values
//   Ints - Floats    zero(), start(Weights): -kOffset times the sum of the values; to_float, add_scaled, rows
//
// Sums are exact in 32-bit integers within a chunk, then scaled and added up in float, chunk by chunk, in one order.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "group.h"
#include "prefetch.h"
#include "quantized.h"
#include "scratch.h"

namespace swiftprune {
namespace {

// ---- eight numbers at once, which compilers make vector instructions of -------------------------------------------------

typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Word8 __attribute__((vector_size(32)));
typedef uint16_t Half8 __attribute__((vector_size(16)));

template <class T>
[[gnu::always_inline]] inline void round8(const float* in, typename T::Bits* out) {
  if constexpr (std::is_same_v<T, Float32>) {
    std::memcpy(out, in, 8 * sizeof(float));
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // as BFloat16::from_float
    Float8 values;
    std::memcpy(&values, in, sizeof values);
    const Word8 bits = reinterpret_cast<Word8>(values);
    const Word8 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, nan = bits >> 16 | 0x40u;
    const Half8 half = __builtin_convertvector(values != values ? nan : rounded, Half8);
    std::memcpy(out, &half, sizeof half);
  } else {
#ifdef __F16C__
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 8; ++i) out[i] = T::from_float(in[i]);
#endif
  }
}

template <class T>
[[gnu::always_inline]] inline void widen8(const typename T::Bits* in, float* out) {
#ifdef __F16C__
  if constexpr (std::is_same_v<T, Float16>)
    return _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
#endif
  for (int i = 0; i < 8; ++i) out[i] = T::to_float(in[i]);
}

// ---- inputs -------------------------------------------------------------------------------------------------------------

// Rounds kQuantInputs inputs to 8 bits: to nearest, ties to even, in steps of the largest / 127. Inputs that are not finite
// make the scale, and with it the outputs, NaN.
inline float quantize_chunk(const float* x, int offset, uint8_t* out) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kQuantInputs; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  const float most = Float32::to_float(largest);
  float inverse = 127.0f / most;
  float scale = most / 127.0f;
  if (largest >= 0x7f800000u) {
    inverse = 0;
    scale = Float32::to_float(0x7fc00000u);
  } else if (!(inverse < 3e38f)) {  // all zeros, or as good as
    inverse = scale = 0;
  }
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const int32_t base = 0x4b400000 - offset;
  for (int64_t i = 0; i < kQuantInputs; ++i) {
    const float shifted = (largest >= 0x7f800000u ? 0.0f : x[i] * inverse) + kRound;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    out[i] = static_cast<uint8_t>(bits - base);
  }
  return scale;
}

// Tokens in tiles of at most `most`, as equal as can be, the last one narrower.
struct Tiles {
  int64_t tokens, each, count;
  Tiles(int64_t tokens, int64_t most)
      : tokens(tokens), each(ceil_div(tokens, ceil_div(tokens, most))), count(ceil_div(tokens, each)) {}
  int64_t begin(int64_t n) const { return std::min(n * each, tokens); }
  int64_t width(int64_t n) const { return begin(n + 1) - begin(n); }
};

template <class T>
void quantize_as(const swiftprune_quant24_args& a, int64_t first, int64_t last, int offset, int64_t most) {
  const Tiles tiles(a.tokens, most);
  const int64_t chunks = quant_chunks(a.cols);
  for (int64_t n = 0; n < tiles.count; ++n)
    for (int64_t c = first; c < last; ++c)
      for (int64_t i = 0; i < tiles.width(n); ++i) {
        const int64_t t = tiles.begin(n) + i;
        const auto* x = static_cast<const typename T::Bits*>(a.x) + t * a.x_stride + c * kQuantInputs;
        float wide[kQuantInputs];
        const int64_t count = std::min(kQuantInputs, a.cols - c * kQuantInputs);
        if (count == kQuantInputs)
          for (int64_t i = 0; i < kQuantInputs; i += 8) widen8<T>(x + i, wide + i);
        else
          for (int64_t i = 0; i < kQuantInputs; ++i) wide[i] = i < count ? T::to_float(x[i]) : 0.0f;
        const int64_t at = tiles.begin(n) * chunks + c * tiles.width(n) + i;
        a.input.scales[at] = quantize_chunk(wide, offset, a.input.bytes + at * kQuantInputs);
      }
}

template <class V>
void quantize(const swiftprune_quant24_args& a, int64_t first, int64_t last) {
  switch (static_cast<Dtype>(a.x_dtype)) {
    case Dtype::kFloat32: return quantize_as<Float32>(a, first, last, V::kOffset, V::kTokens);
    case Dtype::kFloat16: return quantize_as<Float16>(a, first, last, V::kOffset, V::kTokens);
    case Dtype::kBFloat16: return quantize_as<BFloat16>(a, first, last, V::kOffset, V::kTokens);
  }
}

// ---- product ------------------------------------------------------------------------------------------------------------

template <class V, int Bits>
struct Quant24 {
  using Chunk = QuantChunk<Bits>;
  using Index = typename V::Index;
  using Weights = typename V::Weights;
  using Ints = typename V::Ints;
  using Floats = typename V::Floats;
  static constexpr int kSteps = 4 / V::kLanes;  // of a half
  static constexpr int kStepBytes = 16 * V::kLanes;

  // What is kept of a pair of rows in a chunk for many tokens.
  struct Saved8 {
    Index index[2][kSteps];
    Weights weights[2][kSteps];
    Ints start;
  };
  struct Saved4 : Saved8 {
    Floats scale;
  };
  using Saved = std::conditional_t<Bits == 8, Saved8, Saved4>;
  // Of a block; with a tile's inputs it is to stay in L1.
  static constexpr int64_t kPartBytes = 24 << 10;
  static constexpr int64_t kPartChunks = std::max<int64_t>(1, kPartBytes / (kRowPairs * sizeof(Saved)));
  // Of x, which each block reads again, so it is to stay in L2.
  static constexpr int64_t kInputBytes = 384 << 10;
  static constexpr int64_t kFinished = 4;
  // Up to so many tiles it costs less to find the positions anew for each than to keep them.
  static constexpr int64_t kFewTiles = Bits == 8 ? 4 : 3;
  static constexpr int64_t kLines = sizeof(Chunk) / kCacheLine;

  const swiftprune_quant24_args& a;
  const int64_t chunks = quant_chunks(a.cols);
  const Chunk* const tiled = static_cast<const Chunk*>(a.tiled);
  const uint16_t* const scales = reinterpret_cast<const uint16_t*>(tiled + blocks_of(a.rows) * chunks);
  const int64_t ahead = prefetch_for(a.tokens).first_level;

  template <int kHalf>
  [[gnu::always_inline]] static Weights weights_of(const Chunk& chunk, int pair, int step) {
    if constexpr (Bits == 8)
      return V::weights(chunk.values[kHalf][pair] + step * kStepBytes);
    else
      return V::template codes<kHalf>(chunk.values[0][pair] + step * kStepBytes);
  }

  [[gnu::always_inline]] const uint16_t* scales_of(int64_t block, int64_t c) const {
    return scales + (block * chunks + c) * kBlockRows;
  }

  // y of a block for the T tokens from `token` on, straight from the tiled weight, all sums in registers. On the way `lines`
  // lines for each chunk are prefetched from `next`.
  template <int T>
  void direct(int64_t b, int64_t token, const char* next, int64_t lines) const {
    Floats sum[T][kRowPairs];
    for (int t = 0; t < T; ++t)
      for (int p = 0; p < kRowPairs; ++p) sum[t][p] = V::zero_floats();
    const Chunk* chunk = tiled + b * chunks;
    const uint8_t* x = a.input.bytes + token * chunks * kQuantInputs;
    const float* x_scale = a.input.scales + token * chunks;
    for (int64_t c = 0; c < chunks; ++c, ++chunk, x += T * kQuantInputs, x_scale += T) {
      for (int64_t i = 0; i < lines; ++i, next += kCacheLine) __builtin_prefetch(next, 0, 3);
#pragma GCC unroll 4
      for (int p = 0; p < kRowPairs; ++p) {
        Ints start = V::zero(), s[T];
        Index index[2][kSteps];
        Weights w[2][kSteps];
        const auto find = [&](auto half) {
          constexpr int kHalf = decltype(half)::value;
#pragma GCC unroll 4
          for (int i = 0; i < kSteps; ++i) {
            index[kHalf][i] = V::index(chunk->metadata[kHalf][p], i);
            w[kHalf][i] = weights_of<kHalf>(*chunk, p, i);
            start = V::start(start, w[kHalf][i]);
          }
        };
        find(std::integral_constant<int, 0>{});
        find(std::integral_constant<int, 1>{});
        start = V::difference(V::zero(), start);
        for (int t = 0; t < T; ++t) s[t] = start;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
          for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t)
              s[t] = V::dot(s[t], x + t * kQuantInputs + half * kQuantHalf + i * kStepBytes, index[half][i], w[half][i]);
        Floats scale{};
        if constexpr (Bits == 4) scale = V::pair_scale(scales_of(b, c), p);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          sum[t][p] = V::add_scaled(sum[t][p], s[t],
                                    Bits == 4 ? V::times(scale, x_scale[t]) : V::splat(x_scale[t]));
      }
    }
    for (int t = 0; t < T; ++t) {
      float out[kBlockRows];
      V::rows(sum[t], out);
      finish(b, 1, token + t, out, 0);
    }
  }

  void unpack(int64_t block, int64_t begin, int64_t count, Saved* out) const {
    const Chunk* chunk = tiled + block * chunks + begin;
    for (int64_t c = 0; c < count; ++c, ++chunk)
#pragma GCC unroll 4
      for (int p = 0; p < kRowPairs; ++p, ++out) {
        Ints start = V::zero();
        const auto half = [&](auto number) {
          constexpr int kHalf = decltype(number)::value;
          for (int i = 0; i < kSteps; ++i) {
            out->index[kHalf][i] = V::index(chunk->metadata[kHalf][p], i);
            const Weights w = weights_of<kHalf>(*chunk, p, i);
            out->weights[kHalf][i] = w;
            start = V::start(start, w);
          }
        };
        half(std::integral_constant<int, 0>{});
        half(std::integral_constant<int, 1>{});
        out->start = V::difference(V::zero(), start);
        if constexpr (Bits == 4) out->scale = V::pair_scale(scales_of(block, begin + c), p);
      }
  }

  // Adds up `count` chunks for T tokens: sums[t][8] (+)=. On the way `lines` lines for each chunk are prefetched from `next`.
  template <int T>
  void tile(const Saved* saved, int64_t count, const uint8_t* x, const float* x_scale, float* sums, bool add,
            const char* next, int64_t lines) const {
    Floats sum[T][kRowPairs];
    for (int t = 0; t < T; ++t)
      for (int p = 0; p < kRowPairs; ++p) sum[t][p] = V::zero_floats();
    for (int64_t c = 0; c < count; ++c, x += T * kQuantInputs, x_scale += T) {
      for (int64_t i = 0; i < lines; ++i, next += kCacheLine) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
      for (int p = 0; p < kRowPairs; ++p, ++saved) {
        Ints s[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) s[t] = saved->start;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
          for (int i = 0; i < kSteps; ++i) {
            const Index index = saved->index[half][i];
            const Weights w = saved->weights[half][i];
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t)
              s[t] = V::dot(s[t], x + t * kQuantInputs + half * kQuantHalf + i * kStepBytes, index, w);
          }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          sum[t][p] = V::add_scaled(sum[t][p], s[t], x_factor(*saved, x_scale[t]));
      }
    }
    for (int t = 0; t < T; ++t) {
      float out[kBlockRows];
      V::rows(sum[t], out);
      for (int i = 0; i < kBlockRows; ++i) sums[t * kBlockRows + i] = add ? sums[t * kBlockRows + i] + out[i] : out[i];
    }
  }

  [[gnu::always_inline]] static Floats x_factor(const Saved& saved, float x_scale) {
    if constexpr (Bits == 4)
      return V::times(saved.scale, x_scale);
    else
      return V::splat(x_scale);
  }

  template <int T = V::kTokens, class... A>
  void tile_of(int64_t tokens, const A&... args) const {
    if constexpr (T > 0) {
      if (tokens == T) return tile<T>(args...);
      tile_of<T - 1>(tokens, args...);
    }
  }

  template <int T = V::kTokens>
  void direct_of(int64_t tokens, int64_t b, int64_t token, const char* next, int64_t lines) const {
    if constexpr (T > 0) {
      if (tokens == T) return direct<T>(b, token, next, lines);
      direct_of<T - 1>(tokens, b, token, next, lines);
    }
  }

  // Few tokens: a block is read from memory for the first tile and from the caches for those that follow.
  void few(int64_t first, int64_t last) const {
    const Tiles tiles(a.tokens, V::kTokens);
    const int64_t lines = ceil_div(kLines, tiles.count);
    for (int64_t b = first; b < last; ++b) {
      const char* next = reinterpret_cast<const char*>(tiled + b * chunks) + (tiles.count > 1 ? sizeof(Chunk) * chunks : ahead);
      for (int64_t n = 0; n < tiles.count; ++n, next += lines * chunks * kCacheLine)
        direct_of(tiles.width(n), b, tiles.begin(n), next, lines);
    }
  }

  // Many tokens: a block's chunks are unpacked into L1, part by part, and used for tile after tile. Blocks are finished a few
  // at a time, so that whole lines of y are written.
  void many(int64_t first, int64_t last) const {
    static thread_local Scratch saved_scratch, sums_scratch;
    auto* saved = saved_scratch.template get<Saved>(kPartChunks * kRowPairs);
    const int64_t parts = ceil_div(chunks, kPartChunks), part = ceil_div(chunks, parts);
    const Tiles tiles(a.tokens, V::kTokens);
    const int64_t room = std::max<int64_t>(1, kInputBytes / (chunks * kQuantInputs * tiles.each));
    const int64_t stride = std::min(room * tiles.each, a.tokens) * kBlockRows;  // of the sums of a block
    auto* sums = sums_scratch.template get<float>(kFinished * stride);
    for (int64_t from = 0; from < tiles.count; from += room) {
      const int64_t to = std::min(from + room, tiles.count), token = tiles.begin(from);
      const int64_t lines = ceil_div(kLines, to - from);
      for (int64_t b = first; b < last; ++b) {
        float* own = sums + (b - first) % kFinished * stride;
        for (int64_t begin = 0; begin < chunks; begin += part) {
          const int64_t count = std::min(part, chunks - begin);
          unpack(b, begin, count, saved);
          const char* next = reinterpret_cast<const char*>(tiled + b * chunks + begin + count);
          for (int64_t n = from; n < to; ++n, next += lines * count * kCacheLine) {
            const int64_t t = tiles.begin(n), width = tiles.width(n), at = t * chunks + begin * width;
            tile_of(width, saved, count, a.input.bytes + at * kQuantInputs, a.input.scales + at,
                    own + (t - token) * kBlockRows, begin > 0, next, lines);
          }
        }
        const int64_t held = (b - first) % kFinished + 1;
        if (held == kFinished || b + 1 == last)
          for (int64_t t = token; t < tiles.begin(to); ++t)
            finish(b + 1 - held, held, t, sums + (t - token) * kBlockRows, stride);
      }
    }
  }

  // y of `count` blocks from `block` on, whose sums stand `stride` apart.
  void finish(int64_t block, int64_t count, int64_t token, const float* sums, int64_t stride) const {
    switch (static_cast<Dtype>(a.x_dtype)) {
      case Dtype::kFloat32: return finish_as<Float32>(block, count, token, sums, stride);
      case Dtype::kFloat16: return finish_as<Float16>(block, count, token, sums, stride);
      case Dtype::kBFloat16: return finish_as<BFloat16>(block, count, token, sums, stride);
    }
  }

  template <class T>
  void finish_as(int64_t block, int64_t count, int64_t token, const float* sums, int64_t stride) const {
    const int64_t row = block * kBlockRows, rows = std::min(count * kBlockRows, a.rows - row);
    auto* y = static_cast<typename T::Bits*>(a.y) + token * a.y_stride + row;
    for (int64_t r = 0; r < rows; r += kBlockRows, sums += stride) {
      float out[kBlockRows];
      typename T::Bits bits[kBlockRows];
      for (int i = 0; i < kBlockRows; ++i)
        out[i] = Bits == 8 ? sums[i] * BFloat16::to_float(scales[row + r + i]) : sums[i];
      const int64_t have = std::min(kBlockRows, rows - r);
      if (const auto* bias = static_cast<const typename T::Bits*>(a.bias))
        for (int64_t i = 0; i < have; ++i) out[i] += T::to_float(bias[row + r + i]);
      round8<T>(out, bits);
      if (have == kBlockRows)
        std::memcpy(y + r, bits, sizeof bits);
      else
        std::copy_n(bits, have, y + r);
    }
  }

  void run(int64_t first, int64_t last) const {
    if (a.tokens <= kFewTiles * V::kTokens)
      few(first, last);
    else
      many(first, last);
  }
};

template <class V>
void multiply(const swiftprune_quant24_args& a, int64_t first, int64_t last) {
  if (a.bits == 8)
    Quant24<V, 8>{a}.run(first, last);
  else
    Quant24<V, 4>{a}.run(first, last);
}

}  // namespace
}  // namespace swiftprune
