// The matrix product over a tiled weight, written once; each per-ISA file supplies the vector operations as a class V:
//
//   Storage          Float32 | Float16 | BFloat16 of the tiled values and of bias; x is of it too, or of Float32
//   Input            what x is turned into before the product: uint16_t (bf16 bits) or float
//   kInPlace         Input is Storage, so that values can be used where they lie
//   kInputs          inputs that one step covers, for two rows at once: kInputs tiled values
//   kTokens          most tokens that go through in one pass; 4 pairs of rows x kTokens sums in registers
//   kTileTokens      most tokens of a tile of the many-token path, which keeps x in registers as well
//   Sum, Index, Values   registers
//   words(m)         the 64 bits of metadata, spread over lanes
//   index(words, s)  of step s of a half: where in the step's inputs each lane finds its own
//   load(p)          the values of a step
//   inputs(p)        the x of a step
//   dot(sum, index, x, values)
//   rows(sum, out)   the eight rows' sums of one token, lanes added up
//   widen(x, out)    kInputs elements of x -> Input
//   store(sums, y, n)  n <= 8 of eight sums, rounded to the type of y
//
// Everything is in an anonymous namespace, so that no file can pick up code compiled for another file's ISA.
#pragma once

#include <algorithm>
#include <type_traits>

#include "group.h"
#include "linear24.h"
#include "prefetch.h"
#include "scratch.h"
#include "tiled.h"

namespace swiftprune {
namespace {

// Bytes of one token's x in an inner part: its unpacked weights (8 rows) and a tile's x share the L1.
constexpr int64_t kInnerBytes = 2048;
// What an outer part takes of the L2: x of so many tokens and bytes, sums of so many row blocks.
constexpr int64_t kOuterTokens = 128;
constexpr int64_t kOuterBytes = 512 << 10;
constexpr int64_t kOuterBlocks = 128;

template <class T>
void store_rounded(const float* sums, typename T::Bits* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = T::from_float(sums[i]);
}

// Inlined by force: GCC takes a function that does nothing but prefetch for one without effects, and drops its calls.
template <int kLocality>
[[gnu::always_inline]] inline void prefetch_lines(const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * kCacheLine, 0, kLocality);
}
constexpr int kFirstLevel = 3, kSecondLevel = 2;

template <class V>
struct Linear24 {
  using Bits = typename V::Storage::Bits;
  using Input = typename V::Input;
  using Tiled = Chunk<Bits>;
  // What is kept of a step for many tokens; values that need no conversion are read from the tiled weight each time.
  struct Both {
    typename V::Index index;
    typename V::Values values;
  };
  struct IndexOnly {
    typename V::Index index;
  };
  using Saved = std::conditional_t<V::kInPlace, IndexOnly, Both>;
  static constexpr int64_t kInnerChunks = kInnerBytes / static_cast<int64_t>(kChunkInputs * sizeof(Input));
  static constexpr int kHalfSteps = kHalfInputs / V::kInputs;
  static constexpr int kChunkSteps = 2 * kHalfSteps;
  static constexpr int64_t kLines = sizeof(Tiled) / kCacheLine;

  struct Job {
    const swiftprune_linear24_args& a;
    int64_t chunks = chunks_of(a.cols);
    Prefetch prefetch = prefetch_for(a.tokens);
    const Tiled* block(int64_t b) const { return static_cast<const Tiled*>(a.tiled) + b * chunks; }
    template <class T>
    const T* x(int64_t token) const { return static_cast<const T*>(a.x) + token * a.x_stride; }
    // Whether x is Input already.
    bool x_in_place() const {
      if constexpr (std::is_same_v<Input, float>) return a.x_dtype == static_cast<int>(Dtype::kFloat32);
      return true;
    }
  };

  // x of `tokens` tokens from `token` on, inputs [begin, begin + width) with zeros beyond the last column, step by step:
  // out[step][token][kInputs], so that a tile reads one line after the other.
  static void pack_x(const Job& job, int64_t token, int64_t tokens, int64_t begin, int64_t width, Input* out) {
    if (job.x_in_place())
      pack_x_as<Input>(job, token, tokens, begin, width, out,
                       [](const Input* x, Input* to) { std::copy_n(x, V::kInputs, to); });
    else
      pack_x_as<Bits>(job, token, tokens, begin, width, out, V::widen);
  }

  template <class T, class F>
  [[gnu::always_inline]] static void pack_x_as(const Job& job, int64_t token, int64_t tokens, int64_t begin, int64_t width,
                                               Input* out, F convert) {
    for (int64_t t = 0; t < tokens; ++t) {
      const T* x = job.template x<T>(token + t);
      for (int64_t k = begin; k < begin + width; k += V::kInputs) {
        Input* to = out + (k - begin) * tokens + t * V::kInputs;
        if (job.a.cols - k >= V::kInputs) {
          convert(x + k, to);
          continue;
        }
        T last[V::kInputs] = {};
        std::copy_n(x + k, std::max<int64_t>(job.a.cols - k, 0), last);
        convert(last, to);
      }
    }
  }

  // Adds the bias to the sums of block b and rounds them into y.
  static void finish(const Job& job, int64_t b, int64_t token, const float* sums) {
    const int64_t row = b * kBlockRows, count = std::min(kBlockRows, job.a.rows - row);
    float out[kBlockRows];
    std::copy_n(sums, kBlockRows, out);
    if (job.a.bias) {
      const Bits* bias = static_cast<const Bits*>(job.a.bias) + row;
      for (int64_t i = 0; i < count; ++i) out[i] += V::Storage::to_float(bias[i]);
    }
    const int64_t at = token * job.a.y_stride + row;
    if (job.a.y_dtype == static_cast<int>(Dtype::kFloat32))
      std::copy_n(out, count, static_cast<float*>(job.a.y) + at);
    else
      V::store(out, static_cast<Bits*>(job.a.y) + at, count);
  }

  // Asks for a part (one of 2 kRowPairs) of the chunk so far ahead. A whole chunk at once would fill the buffers that
  // misses wait in, and hold up the loads behind it.
  [[gnu::always_inline]] static void prefetch_part(Prefetch ahead, const Tiled* chunk, int part) {
    const int64_t begin = kLines * part / (2 * kRowPairs), lines = kLines * (part + 1) / (2 * kRowPairs) - begin;
    const char* from = reinterpret_cast<const char*>(chunk) + begin * kCacheLine;
    if (ahead.second_level) prefetch_lines<kSecondLevel>(from + ahead.second_level, lines);
    if (ahead.first_level) prefetch_lines<kFirstLevel>(from + ahead.first_level, lines);
  }

  // Few tokens: one pass over the tiled weight, all sums of a block in registers.
  template <int T>
  static void one_tile(const Job& job, const Input* x, int64_t first, int64_t last) {
    const Prefetch prefetch = job.prefetch;
    for (int64_t b = first; b < last; ++b) {
      typename V::Sum sum[T][kRowPairs];
      for (int t = 0; t < T; ++t)
        for (int p = 0; p < kRowPairs; ++p) sum[t][p] = V::zero();
      const Tiled* chunk = job.block(b);
      const Input* at = x;
      for (int64_t c = 0; c < job.chunks; ++c, ++chunk) {
        for (int half = 0; half < 2; ++half, at += kHalfInputs * T)
#pragma GCC unroll 4
          for (int p = 0; p < kRowPairs; ++p) {
            prefetch_part(prefetch, chunk, half * kRowPairs + p);
            const auto words = V::words(chunk->metadata[half][p]);
#pragma GCC unroll 8
            for (int s = 0; s < kHalfSteps; ++s) {
              const auto index = V::index(words, s);
              const auto values = V::load(chunk->values[half][p] + s * V::kInputs);
#pragma GCC unroll 8
              for (int t = 0; t < T; ++t)
                sum[t][p] = V::dot(sum[t][p], index, V::inputs(at + (s * T + t) * V::kInputs), values);
            }
          }
      }
      for (int t = 0; t < T; ++t) {
        float out[kBlockRows];
        V::rows(sum[t], out);
        finish(job, b, t, out);
      }
    }
  }

  // Many tokens: a block's chunks are unpacked once into the L1 and used for tile after tile.
  static void unpack(const Tiled* chunk, int64_t chunks, Saved* out) {
    for (int64_t c = 0; c < chunks; ++c, ++chunk)
      for (int half = 0; half < 2; ++half)
        for (int p = 0; p < kRowPairs; ++p) {
          const auto words = V::words(chunk->metadata[half][p]);
          for (int s = 0; s < kHalfSteps; ++s) {
            Saved& saved = out[((c * 2 + half) * kHalfSteps + s) * kRowPairs + p];
            saved.index = V::index(words, s);
            if constexpr (!V::kInPlace) saved.values = V::load(chunk->values[half][p] + s * V::kInputs);
          }
        }
  }

  static typename V::Values values_of(const Saved& saved, const Bits* tiled) {
    if constexpr (V::kInPlace)
      return V::load(tiled);
    else
      return saved.values;
  }

  // sums[t][8] (+)= the product of `steps` steps; lines of the weight to come are prefetched on the way.
  template <int T>
  static void tile(const Job& job, const Tiled* chunk, const Saved* saved, const Input* x, int64_t chunks, float* sums,
                   bool add, const char* next, int64_t lines) {
    typename V::Sum sum[T][kRowPairs];
    for (int t = 0; t < T; ++t)
      for (int p = 0; p < kRowPairs; ++p) sum[t][p] = V::zero();
    for (int64_t c = 0; c < chunks; ++c, ++chunk, next += lines * kCacheLine) {
      if (job.prefetch.second_level)
        prefetch_lines<kSecondLevel>(next, lines);
      else
        prefetch_lines<kFirstLevel>(next, lines);
      for (int half = 0; half < 2; ++half)
        for (int s = 0; s < kHalfSteps; ++s, x += T * V::kInputs) {
          decltype(V::inputs(x)) own[T];
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) own[t] = V::inputs(x + t * V::kInputs);
#pragma GCC unroll 4
          for (int p = 0; p < kRowPairs; ++p, ++saved) {
            const auto values = values_of(*saved, chunk->values[half][p] + s * V::kInputs);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) sum[t][p] = V::dot(sum[t][p], saved->index, own[t], values);
          }
        }
    }
    for (int t = 0; t < T; ++t) {
      float out[kBlockRows];
      V::rows(sum[t], out);
      for (int i = 0; i < kBlockRows; ++i) sums[t * kBlockRows + i] = add ? sums[t * kBlockRows + i] + out[i] : out[i];
    }
  }

  template <int T = V::kTileTokens, class... A>
  static void tile_of(int64_t tokens, const A&... args) {
    if constexpr (T > 0) {
      if (tokens == T) return tile<T>(args...);
      tile_of<T - 1>(tokens, args...);
    }
  }

  template <int T = V::kTokens, class... A>
  static void one_tile_of(int64_t tokens, const A&... args) {
    if constexpr (T > 0) {
      if (tokens == T) return one_tile<T>(args...);
      one_tile_of<T - 1>(tokens, args...);
    }
  }

  static void few_tokens(const Job& job, int64_t first, int64_t last) {
    const int64_t width = job.chunks * kChunkInputs, tokens = job.a.tokens;
    const Input* x = reinterpret_cast<const Input*>(job.a.x);
    if (!job.x_in_place() || tokens > 1 || width != job.a.cols) {
      static thread_local Scratch scratch;
      Input* packed = scratch.template get<Input>(tokens * width);
      pack_x(job, 0, tokens, 0, width, packed);
      x = packed;
    }
    one_tile_of(tokens, job, x, first, last);
  }

  static void many_tokens(const Job& job, int64_t first, int64_t last) {
    const int64_t inners = ceil_div(job.chunks, kInnerChunks);
    const int64_t inner_inputs = ceil_div(job.chunks, inners) * kChunkInputs;
    const int64_t outer_room = kOuterBytes / (inner_inputs * static_cast<int64_t>(sizeof(Input)));
    // All of x when it fits, so that the weight is read in order; else some of the tokens and some of the inputs.
    const bool whole = inners * job.a.tokens <= outer_room;
    const int64_t outer_tokens = whole ? job.a.tokens : std::min(job.a.tokens, kOuterTokens);
    const int64_t outer_inners = whole ? inners : std::max<int64_t>(1, outer_room / outer_tokens);
    const int64_t outer_blocks = whole ? last - first : std::min(last - first, kOuterBlocks);

    static thread_local Scratch x_scratch, saved_scratch, sums_scratch;
    Input* x = x_scratch.template get<Input>(outer_inners * outer_tokens * inner_inputs);
    Saved* saved = saved_scratch.template get<Saved>(kInnerChunks * kChunkSteps * kRowPairs);
    float* sums = sums_scratch.template get<float>((whole ? 1 : outer_blocks) * outer_tokens * kBlockRows);

    for (int64_t token = 0; token < job.a.tokens; token += outer_tokens) {
      const int64_t tokens = std::min(outer_tokens, job.a.tokens - token);
      const int64_t tiles = ceil_div(tokens, V::kTileTokens);
      const int64_t lines = ceil_div(kLines, tiles);  // of each chunk to come, asked for by each tile
      for (int64_t block = first; block < last; block += outer_blocks)
        for (int64_t inner = 0; inner < inners; inner += outer_inners) {
          const int64_t end_inner = std::min(inner + outer_inners, inners);
          for (int64_t i = inner; i < end_inner; ++i)
            for (int64_t n = 0; n < tiles; ++n) {
              const int64_t t = tokens * n / tiles, begin = i * inner_inputs;
              pack_x(job, token + t, tokens * (n + 1) / tiles - t, begin,
                     std::min(inner_inputs, job.chunks * kChunkInputs - begin),
                     x + ((i - inner) * outer_tokens + t) * inner_inputs);
            }
          for (int64_t b = block; b < std::min(block + outer_blocks, last); ++b) {
            float* block_sums = sums + (whole ? 0 : b - block) * outer_tokens * kBlockRows;
            for (int64_t i = inner; i < end_inner; ++i) {
              const int64_t begin = i * inner_inputs / kChunkInputs;
              const int64_t chunks = std::min(inner_inputs / kChunkInputs, job.chunks - begin);
              const Tiled* chunk = job.block(b) + begin;
              unpack(chunk, chunks, saved);
              // Where x does not fit, a block is left before its end, and the next one begins elsewhere.
              const char* next = reinterpret_cast<const char*>(
                  i + 1 < end_inner ? chunk + chunks : job.block(b + 1) + inner * inner_inputs / kChunkInputs);
              for (int64_t n = 0; n < tiles; ++n, next += lines * chunks * kCacheLine) {
                const int64_t t = tokens * n / tiles;
                tile_of(tokens * (n + 1) / tiles - t, job, chunk, saved, x + ((i - inner) * outer_tokens + t) * inner_inputs,
                        chunks, block_sums + t * kBlockRows, i > 0, next, lines);
              }
            }
            if (end_inner == inners)
              for (int64_t t = 0; t < tokens; ++t) finish(job, b, token + t, block_sums + t * kBlockRows);
          }
        }
    }
  }

  static void run(const swiftprune_linear24_args& args, int64_t first, int64_t last) {
    const Job job{args};
    if (args.tokens <= V::kTokens)
      few_tokens(job, first, last);
    else
      many_tokens(job, first, last);
  }
};

template <template <class> class V>
void run_linear24(const swiftprune_linear24_args& args, int64_t first, int64_t last) {
  switch (static_cast<Dtype>(args.dtype)) {
    case Dtype::kFloat32: return Linear24<V<Float32>>::run(args, first, last);
    case Dtype::kFloat16: return Linear24<V<Float16>>::run(args, first, last);
    case Dtype::kBFloat16: return Linear24<V<BFloat16>>::run(args, first, last);
  }
}

}  // namespace
}  // namespace swiftprune
