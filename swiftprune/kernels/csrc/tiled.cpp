#include "tiled.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>

#include "group.h"

namespace swiftprune {
namespace {

constexpr int64_t kHalfGroups = kHalfInputs / kGroup;

// Calls visit(chunk, half, pair, lane0, row, group) for every group of `rows` x `cols` in the blocks: lane0 is 0 for
// the first row of a pair and 2 for the second.
template <class ChunkPointer, class F>
void each_group(ChunkPointer tiled, int64_t rows, int64_t cols, int64_t first, int64_t last, F visit) {
  const int64_t chunks = chunks_of(cols), groups = cols / kGroup;
  for (int64_t row = first * kBlockRows; row < std::min(rows, last * kBlockRows); ++row) {
    ChunkPointer chunk = tiled + row / kBlockRows * chunks;
    const int64_t pair = row % kBlockRows / 2, lane0 = row % 2 * kKept;
    for (int64_t g = 0; g < groups; ++g)
      visit(chunk[g / (2 * kHalfGroups)], g / kHalfGroups % 2, pair, lane0, row, g);
  }
}

// Bits 0, 1 of every nibble, next to each other: of eight nibbles in 32 bits 16, for each half of the word.
uint64_t gather_positions(uint64_t nibbles) {
  nibbles &= 0x3333333333333333u;
  nibbles = (nibbles | nibbles >> 2) & 0x0f0f0f0f0f0f0f0fu;
  nibbles = (nibbles | nibbles >> 4) & 0x00ff00ff00ff00ffu;
  return (nibbles | nibbles >> 8) & 0x0000ffff0000ffffu;
}

// Whether the first position of each nibble is less than the second: per nibble, 4 + second - first - 1 >= 4.
bool all_ascend(uint32_t nibbles) {
  const uint32_t first = nibbles & 0x33333333u, second = nibbles >> 2 & 0x33333333u;
  return (((second | 0x44444444u) - first - 0x11111111u) & 0x44444444u) == 0x44444444u;
}

// What 32 inputs of one row hold, eight groups, or those that are left at its end, filled up with zeros: values packed
// into words, and a nibble for each group.
template <class Bits>
struct HalfRow {
  static constexpr int kWords = kHalfGroups * kKept * sizeof(Bits) / sizeof(uint64_t);
  uint64_t words[kWords] = {};
  uint32_t nibbles = 0;
};

// The last `count` groups of a row; false when a nibble, or the unused one behind the last, breaks the format.
template <class Bits>
bool read_end(const Bits* kept, const uint8_t* metadata, int64_t count, HalfRow<Bits>& half) {
  bool valid = count % 2 == 0 || metadata[count / 2] >> 4 == 0;
  std::memcpy(half.words, kept, count * kKept * sizeof(Bits));
  for (int64_t g = 0; g < count; ++g) {
    const auto nibble = static_cast<uint8_t>(metadata[g / 2] >> (g % 2 * 4) & 15);
    valid &= valid_nibble(nibble);
    half.nibbles |= static_cast<uint32_t>(nibble) << (4 * g);
  }
  return valid;
}

// False when a nibble breaks the format.
template <class Bits>
inline bool read_half(const Bits* kept, const uint8_t* metadata, int64_t count, HalfRow<Bits>& half) {
  if (count < kHalfGroups) return read_end(kept, metadata, count, half);
  std::memcpy(half.words, kept, sizeof half.words);
  std::memcpy(&half.nibbles, metadata, sizeof half.nibbles);
  return all_ascend(half.nibbles);
}

// The same bits in each value of a word.
template <class Bits>
constexpr uint64_t in_each(Bits bits) {
  return sizeof(Bits) == 2 ? bits * 0x0001000100010001u : bits * 0x0000000100000001u;
}

// With the sign bit of a value set where that value is infinite or not a number: all bits of its exponent are set, so
// that adding the lowest of them carries into the sign.
template <class Bits>
uint64_t not_finite(const HalfRow<Bits>& half, Bits exponent) {
  const auto lowest = static_cast<Bits>(exponent & -exponent);
  uint64_t found = 0;
  for (uint64_t word : half.words) found |= (word & in_each(exponent)) + in_each(lowest);
  return found & ~in_each(static_cast<Bits>(exponent | (lowest - 1)));
}

// The values of two rows, group by group; one group takes half a word, or of fp32 a whole one.
template <class Bits>
void interleave(const HalfRow<Bits>& a, const HalfRow<Bits>& b, Bits* out) {
  constexpr uint64_t kLow = 0xffffffffu;
  auto* to = reinterpret_cast<char*>(out);
  for (int i = 0; i < HalfRow<Bits>::kWords; ++i, to += 2 * sizeof(uint64_t)) {
    const bool narrow = sizeof(Bits) == 2;
    const uint64_t first = narrow ? (a.words[i] & kLow) | b.words[i] << 32 : a.words[i];
    const uint64_t second = narrow ? a.words[i] >> 32 | (b.words[i] & ~kLow) : b.words[i];
    std::memcpy(to, &first, sizeof first);
    std::memcpy(to + sizeof first, &second, sizeof second);
  }
}

template <class Bits>
bool to_tiled_as(const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* out, int64_t first,
                  int64_t last, Bits exponent) {
  auto* tiled = static_cast<Chunk<Bits>*>(out);
  const int64_t stride = metadata_stride(cols), groups = cols / kGroup, halves = ceil_div(groups, kHalfGroups);
  bool valid = true;
  uint64_t unfinite = 0;
  for (int64_t block = first; block < last; ++block) {
    Chunk<Bits>* chunks = tiled + block * chunks_of(cols);
    if (halves % 2) chunks[chunks_of(cols) - 1] = {};  // of which the second half is not written
    for (int64_t half = 0; half < halves; ++half) {
      const int64_t g = half * kHalfGroups, count = std::min(kHalfGroups, groups - g);
      for (int64_t pair = 0; pair < kRowPairs; ++pair) {
        HalfRow<Bits> both[2] = {};
        for (int64_t odd = 0; odd < 2; ++odd) {
          const int64_t row = block * kBlockRows + 2 * pair + odd;
          if (row >= rows) break;
          valid &= read_half(static_cast<const Bits*>(values) + row * (cols / kKept) + g * kKept,
                             metadata + row * stride + g / 2, count, both[odd]);
          unfinite |= not_finite(both[odd], exponent);
        }
        Chunk<Bits>& chunk = chunks[half / 2];
        interleave(both[0], both[1], chunk.values[half % 2][pair]);
        const uint64_t nibbles = both[0].nibbles | static_cast<uint64_t>(both[1].nibbles) << 32;
        chunk.metadata[half % 2][pair] = gather_positions(nibbles) | gather_positions(nibbles >> 2) << 16;
      }
    }
  }
  return valid && !unfinite;
}

template <class Bits>
void from_tiled_as(const void* in, int64_t rows, int64_t cols, void* values, uint8_t* metadata, int64_t first,
                    int64_t last) {
  const int64_t stride = metadata_stride(cols);
  const int64_t begin = first * kBlockRows, end = std::min(rows, last * kBlockRows);
  std::fill(metadata + begin * stride, metadata + end * stride, uint8_t{0});
  each_group(static_cast<const Chunk<Bits>*>(in), rows, cols, first, last,
             [&](const Chunk<Bits>& chunk, int64_t half, int64_t pair, int64_t lane0, int64_t row, int64_t g) {
               Bits* kept = static_cast<Bits*>(values) + row * (cols / kKept) + g * kKept;
               const int64_t in_half = g % kHalfGroups;
               unsigned nibble = 0;
               for (int64_t j = 0; j < kKept; ++j) {
                 kept[j] = chunk.values[half][pair][in_half * kGroup + lane0 + j];
                 nibble |= (chunk.metadata[half][pair] >> (16 * (lane0 + j) + 2 * in_half) & 3u) << (2 * j);
               }
               metadata[row * stride + g / 2] |= static_cast<uint8_t>(nibble << (g % 2 * 4));
             });
}

}  // namespace

int64_t tiled_bytes(Dtype dtype, int64_t rows, int64_t cols) {
  const int64_t chunk = dtype == Dtype::kFloat32 ? sizeof(Chunk<uint32_t>) : sizeof(Chunk<uint16_t>);
  return blocks_of(rows) * chunks_of(cols) * chunk;
}

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const auto start = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

void drop_pages([[maybe_unused]] uintptr_t begin, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const uintptr_t start = (begin + kPage - 1) / kPage * kPage, end = (begin + bytes) / kPage * kPage;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
#endif
}

bool to_tiled(Dtype dtype, const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* tiled,
               int64_t first, int64_t last) {
  switch (dtype) {
    case Dtype::kFloat32: return to_tiled_as<uint32_t>(values, metadata, rows, cols, tiled, first, last, 0x7f800000u);
    case Dtype::kFloat16: return to_tiled_as<uint16_t>(values, metadata, rows, cols, tiled, first, last, 0x7c00u);
    case Dtype::kBFloat16: return to_tiled_as<uint16_t>(values, metadata, rows, cols, tiled, first, last, 0x7f80u);
  }
  return false;
}

void from_tiled(Dtype dtype, const void* tiled, int64_t rows, int64_t cols, void* values, uint8_t* metadata,
                 int64_t first, int64_t last) {
  const auto run = dtype == Dtype::kFloat32 ? from_tiled_as<uint32_t> : from_tiled_as<uint16_t>;
  run(tiled, rows, cols, values, metadata, first, last);
}

}  // namespace swiftprune
