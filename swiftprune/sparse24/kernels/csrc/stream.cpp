#include "stream.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

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

template <class Bits>
void to_stream_as(const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* out, int64_t first,
                  int64_t last) {
  auto* stream = static_cast<Chunk<Bits>*>(out);
  std::fill(stream + first * chunks_of(cols), stream + last * chunks_of(cols), Chunk<Bits>{});
  const int64_t stride = metadata_stride(cols);
  each_group(stream, rows, cols, first, last,
             [&](Chunk<Bits>& chunk, int64_t half, int64_t pair, int64_t lane0, int64_t row, int64_t g) {
               const Bits* kept = static_cast<const Bits*>(values) + row * (cols / kKept) + g * kKept;
               const uint64_t nibble = metadata[row * stride + g / 2] >> (g % 2 * 4) & 15u;
               const int64_t in_half = g % kHalfGroups;
               for (int64_t j = 0; j < kKept; ++j) {
                 chunk.values[half][pair][in_half * kGroup + lane0 + j] = kept[j];
                 chunk.metadata[half][pair] |= (nibble >> (2 * j) & 3u) << (16 * (lane0 + j) + 2 * in_half);
               }
             });
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

void to_stream(Dtype dtype, const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* stream,
               int64_t first, int64_t last) {
  const auto run = dtype == Dtype::kFloat32 ? to_stream_as<uint32_t> : to_stream_as<uint16_t>;
  run(values, metadata, rows, cols, stream, first, last);
}

void from_stream(Dtype dtype, const void* stream, int64_t rows, int64_t cols, void* values, uint8_t* metadata,
                 int64_t first, int64_t last) {
  const auto run = dtype == Dtype::kFloat32 ? from_stream_as<uint32_t> : from_stream_as<uint16_t>;
  run(stream, rows, cols, values, metadata, first, last);
}

}  // namespace swiftprune
