#include <algorithm>
#include <cstring>

#include "group.h"
#include "quantized.h"
#include "scratch.h"
#include "threads.h"

namespace swiftprune {

namespace {

constexpr int64_t kHalfBytes = kQuantHalf / 8;  // canonical metadata of a half and a row

// Of canonical byte i of a half, for row A; B's is the next.
constexpr int64_t metadata_place(int64_t i) { return i % 2 * 8 + i / 2 * 2; }
// Of the first of the four values of the groups 2 i and 2 i + 1 of a half, for row A; B's are four further on.
constexpr int64_t value_place(int64_t i) { return i * 8; }

bool valid_byte(uint8_t byte) { return kPairs.valid[byte]; }

// Calls visit(row, half in the row, chunk, half in the chunk, pair, 0 for A or 1 for B, canonical bytes of metadata there).
template <int Bits, class ChunkPointer, class F>
void each_half(ChunkPointer chunks, int64_t rows, int64_t cols, int64_t first, int64_t last, F visit) {
  const int64_t per_block = quant_chunks(cols), stride = ceil_div(cols, 8);
  for (int64_t row = first * kBlockRows; row < std::min(rows, last * kBlockRows); ++row)
    for (int64_t i = 0; i < stride; i += kHalfBytes)
      visit(row, i, chunks[row / kBlockRows * per_block + i / (2 * kHalfBytes)], i / kHalfBytes % 2, row % kBlockRows / 2,
            row % 2, std::min(kHalfBytes, stride - i));
}

template <int Bits>
bool to_tiled_as(const uint8_t* values, const uint8_t* metadata, const uint16_t* scales, int64_t rows, int64_t cols,
                 void* tiled, int64_t first, int64_t last) {
  using Chunk = QuantChunk<Bits>;
  auto* chunks = static_cast<Chunk*>(tiled);
  const int64_t per_block = quant_chunks(cols), stride = ceil_div(cols, 8), groups = cols / kGroup;
  const int64_t value_stride = Bits == 8 ? cols / 2 : cols / 4;
  std::memset(static_cast<void*>(chunks + first * per_block), 0, (last - first) * per_block * sizeof(Chunk));
  bool valid = true;
  each_half<Bits>(chunks, rows, cols, first, last,
                  [&](int64_t row, int64_t begin, Chunk& chunk, int64_t half, int64_t pair, int64_t odd, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t g = 2 * (begin + i);
      const uint8_t byte = metadata[row * stride + begin + i];
      const bool whole = g + 1 < groups;
      valid &= whole ? valid_byte(byte) : byte < 16 && valid_nibble(byte);
      chunk.metadata[half][pair][metadata_place(i) + odd] = byte;
      const int64_t place = value_place(i) + 4 * odd;
      if constexpr (Bits == 8) {
        uint8_t* to = chunk.values[half][pair] + place;
        std::memcpy(to, values + row * value_stride + 2 * g, whole ? 4 : 2);
        for (int j = 0; j < 4; ++j) valid &= to[j] != 0x80;
      } else {
        for (int64_t j = 0; j < (whole ? 2 : 1); ++j) {
          const uint8_t both = values[row * value_stride + g + j];
          uint8_t* to = chunk.values[0][pair] + place + 2 * j;
          to[0] = static_cast<uint8_t>(to[0] | (both & 15) << (4 * half));
          to[1] = static_cast<uint8_t>(to[1] | (both >> 4) << (4 * half));
        }
      }
    }
  });
  const int64_t blocks = ceil_div(rows, kBlockRows), each = Bits == 8 ? 1 : per_block;
  auto* out = reinterpret_cast<uint16_t*>(chunks + blocks * per_block);
  for (int64_t block = first; block < last; ++block)
    for (int64_t c = 0; c < each; ++c)
      for (int64_t r = 0; r < kBlockRows; ++r) {
        const int64_t row = block * kBlockRows + r;
        const uint16_t scale = row < rows ? scales[row * each + c] : 0;
        valid &= (scale & 0x7f80u) != 0x7f80u;
        out[(block * each + c) * kBlockRows + r] = scale;
      }
  return valid;
}

template <int Bits>
void from_tiled_as(const void* tiled, int64_t rows, int64_t cols, uint8_t* values, uint8_t* metadata, uint16_t* scales,
                   int64_t first, int64_t last) {
  using Chunk = QuantChunk<Bits>;
  const auto* chunks = static_cast<const Chunk*>(tiled);
  const int64_t per_block = quant_chunks(cols), stride = ceil_div(cols, 8), groups = cols / kGroup;
  const int64_t value_stride = Bits == 8 ? cols / 2 : cols / 4;
  each_half<Bits>(chunks, rows, cols, first, last,
                  [&](int64_t row, int64_t begin, const Chunk& chunk, int64_t half, int64_t pair, int64_t odd, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t g = 2 * (begin + i), place = value_place(i) + 4 * odd;
      const bool whole = g + 1 < groups;
      metadata[row * stride + begin + i] = chunk.metadata[half][pair][metadata_place(i) + odd];
      if constexpr (Bits == 8) {
        std::memcpy(values + row * value_stride + 2 * g, chunk.values[half][pair] + place, whole ? 4 : 2);
      } else {
        for (int64_t j = 0; j < (whole ? 2 : 1); ++j) {
          const uint8_t* from = chunk.values[0][pair] + place + 2 * j;
          values[row * value_stride + g + j] =
              static_cast<uint8_t>((from[0] >> (4 * half) & 15) | (from[1] >> (4 * half) & 15) << 4);
        }
      }
    }
  });
  const int64_t blocks = ceil_div(rows, kBlockRows), each = Bits == 8 ? 1 : per_block;
  const auto* in = reinterpret_cast<const uint16_t*>(chunks + blocks * per_block);
  for (int64_t row = first * kBlockRows; row < std::min(rows, last * kBlockRows); ++row)
    for (int64_t c = 0; c < each; ++c)
      scales[row * each + c] = in[(row / kBlockRows * each + c) * kBlockRows + row % kBlockRows];
}

}  // namespace

bool to_quant_tiled(int bits, const uint8_t* values, const uint8_t* metadata, const uint16_t* scales, int64_t rows,
                    int64_t cols, void* tiled, int64_t first, int64_t last) {
  const auto run = bits == 8 ? to_tiled_as<8> : to_tiled_as<4>;
  return run(values, metadata, scales, rows, cols, tiled, first, last);
}

void from_quant_tiled(int bits, const void* tiled, int64_t rows, int64_t cols, uint8_t* values, uint8_t* metadata,
                      uint16_t* scales, int64_t first, int64_t last) {
  const auto run = bits == 8 ? from_tiled_as<8> : from_tiled_as<4>;
  run(tiled, rows, cols, values, metadata, scales, first, last);
}

void run_quant24(const QuantKernel& kernel, swiftprune_quant24_args args, int parts, const Parallel& parallel) {
  // Of inputs; below, waking another thread costs more than rounding them alone.
  constexpr int64_t kInputsPerThread = 64 << 10;
  static thread_local Scratch scratch;
  const int64_t chunks = quant_chunks(args.cols), blocks = blocks_of(args.rows), all = chunks * args.tokens;
  args.input.bytes = scratch.get<uint8_t>(all * (kQuantInputs + static_cast<int64_t>(sizeof(float))));
  args.input.scales = reinterpret_cast<float*>(args.input.bytes + all * kQuantInputs);
  const auto split = [](int64_t wanted, int64_t most) {
    return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  };
  const int rounding = split(std::min<int64_t>(parts, all * kQuantInputs / kInputsPerThread), chunks);
  parallel(rounding, [&](int i) { kernel.quantize(args, chunks * i / rounding, chunks * (i + 1) / rounding); });
  const int count = split(parts, blocks);
  parallel(count, [&](int i) { kernel.multiply(args, blocks * i / count, blocks * (i + 1) / count); });
}

}  // namespace swiftprune
