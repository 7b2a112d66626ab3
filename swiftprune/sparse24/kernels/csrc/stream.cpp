#include "stream.h"

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
void each_group(ChunkPointer stream, int64_t rows, int64_t cols, int64_t first, int64_t last, F visit) {
  const int64_t chunks = chunks_of(cols), groups = cols / kGroup;
  for (int64_t row = first * kBlockRows; row < std::min(rows, last * kBlockRows); ++row) {
    ChunkPointer chunk = stream + row / kBlockRows * chunks;
    const int64_t pair = row % kBlockRows / 2, lane0 = row % 2 * kKept;
    for (int64_t g = 0; g < groups; ++g)
      visit(chunk[g / (2 * kHalfGroups)], g / kHalfGroups % 2, pair, lane0, row, g);
  }
}

// Bits 0, 1 of every nibble, or with `bits` shifted by 2 bits 2, 3, next to each other: 8 positions in 16 bits.
uint64_t gather_positions(uint32_t bits) {
  bits &= 0x33333333u;
  bits = (bits | bits >> 2) & 0x0f0f0f0fu;
  bits = (bits | bits >> 4) & 0x00ff00ffu;
  return (bits | bits >> 8) & 0xffffu;
}

// Whether the first position of each nibble is less than the second: per nibble, 4 + second - first - 1 >= 4.
bool all_ascend(uint32_t nibbles) {
  const uint32_t first = nibbles & 0x33333333u, second = nibbles >> 2 & 0x33333333u;
  return (((second | 0x44444444u) - first - 0x11111111u) & 0x44444444u) == 0x44444444u;
}

// What 32 inputs of one row hold: eight groups, or those that are left at its end, filled up with zeros.
template <class Bits>
struct HalfRow {
  Bits kept[kHalfGroups][kKept];
  uint32_t nibbles;  // one a group
};

// False when a nibble, the unused one behind the last or a value breaks the format.
template <class Bits>
bool read_half(const Bits* kept, const uint8_t* metadata, int64_t count, Bits exponent, HalfRow<Bits>& half) {
  bool valid = true;
  if (count == kHalfGroups) {
    std::memcpy(half.kept, kept, sizeof half.kept);
    std::memcpy(&half.nibbles, metadata, sizeof half.nibbles);
    valid = all_ascend(half.nibbles);
  } else {
    half = {};
    std::memcpy(half.kept, kept, count * kKept * sizeof(Bits));
    for (int64_t g = 0; g < count; ++g) {
      const auto nibble = static_cast<uint8_t>(metadata[g / 2] >> (g % 2 * 4) & 15);
      valid &= valid_nibble(nibble);
      half.nibbles |= static_cast<uint32_t>(nibble) << (4 * g);
    }
    if (count % 2) valid &= metadata[count / 2] >> 4 == 0;
  }
  Bits infinite = 0;
  for (int64_t i = 0; i < kHalfGroups * kKept; ++i)  // all bits of the exponent set: infinite, or not a number
    infinite |= static_cast<Bits>((half.kept[i / kKept][i % kKept] & exponent) == exponent);
  return valid && !infinite;
}

template <class Bits>
bool to_stream_as(const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* out, int64_t first,
                  int64_t last, Bits exponent) {
  auto* stream = static_cast<Chunk<Bits>*>(out);
  const int64_t stride = metadata_stride(cols), groups = cols / kGroup, halves = ceil_div(groups, kHalfGroups);
  bool valid = true;
  for (int64_t block = first; block < last; ++block) {
    Chunk<Bits>* chunks = stream + block * chunks_of(cols);
    if (halves % 2) chunks[chunks_of(cols) - 1] = {};  // of which the second half is not written
    for (int64_t pair = 0; pair < kRowPairs; ++pair) {
      const int64_t row = block * kBlockRows + 2 * pair;
      for (int64_t half = 0; half < halves; ++half) {
        const int64_t g = half * kHalfGroups, count = std::min(kHalfGroups, groups - g);
        HalfRow<Bits> both[2] = {};
        for (int64_t odd = 0; odd < std::min<int64_t>(2, rows - row); ++odd)
          valid &= read_half(static_cast<const Bits*>(values) + (row + odd) * (cols / kKept) + g * kKept,
                             metadata + (row + odd) * stride + g / 2, count, exponent, both[odd]);
        Chunk<Bits>& chunk = chunks[half / 2];
        uint64_t positions = 0;
        for (int odd = 1; odd >= 0; --odd)
          positions = positions << 32 | gather_positions(both[odd].nibbles >> 2) << 16 |
                      gather_positions(both[odd].nibbles);
        chunk.metadata[half % 2][pair] = positions;
        Bits* to = chunk.values[half % 2][pair];
        for (int64_t i = 0; i < kHalfGroups; ++i)
          for (int64_t odd = 0; odd < 2; ++odd)
            std::memcpy(to + i * kGroup + odd * kKept, both[odd].kept[i], sizeof both[odd].kept[i]);
      }
    }
  }
  return valid;
}

template <class Bits>
void from_stream_as(const void* in, int64_t rows, int64_t cols, void* values, uint8_t* metadata, int64_t first,
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

int64_t stream_bytes(Dtype dtype, int64_t rows, int64_t cols) {
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

bool to_stream(Dtype dtype, const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* stream,
               int64_t first, int64_t last) {
  switch (dtype) {
    case Dtype::kFloat32: return to_stream_as<uint32_t>(values, metadata, rows, cols, stream, first, last, 0x7f800000u);
    case Dtype::kFloat16: return to_stream_as<uint16_t>(values, metadata, rows, cols, stream, first, last, 0x7c00u);
    case Dtype::kBFloat16: return to_stream_as<uint16_t>(values, metadata, rows, cols, stream, first, last, 0x7f80u);
  }
  return false;
}

void from_stream(Dtype dtype, const void* stream, int64_t rows, int64_t cols, void* values, uint8_t* metadata,
                 int64_t first, int64_t last) {
  const auto run = dtype == Dtype::kFloat32 ? from_stream_as<uint32_t> : from_stream_as<uint16_t>;
  run(stream, rows, cols, values, metadata, first, last);
}

}  // namespace swiftprune
