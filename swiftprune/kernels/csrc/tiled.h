// The tiled layout: a packed 2:4 weight as the CPU linear kernels read it, front to back, every byte once per call.
//
// Rows are taken eight at a time (a block) and inputs 64 at a time (a chunk); chunk (b, c) of the weight stands at
// b * chunks + c. Rows and inputs are filled up with zeros. A block's four pairs of rows (A, B) share registers:
//
//   metadata[half][pair]     64 bits for 2 rows x 32 inputs (8 groups of four), as four 16-bit words:
//                            word 0: pos0 of row A, word 1: pos1 of A, word 2: pos0 of B, word 3: pos1 of B,
//                            each with group g at bits 2g and 2g + 1
//   values[half][pair][32]   group g: A's two values, then B's two, at 4g .. 4g + 3
//
// So lane i of a vector of values belongs to group i / 4, and finds its position in word i % 4 at bit 2 (i / 4): one
// broadcast of the 64 bits and one variable shift yield the positions of all lanes. Lanes of a 128-bit quarter of
// fp32 values share one group of four inputs, which is what `vpermilps` selects from.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparse24.h"

namespace swiftprune {

constexpr int64_t kRowPairs = 4;
constexpr int64_t kBlockRows = 2 * kRowPairs;
constexpr int64_t kHalfInputs = 32;
constexpr int64_t kChunkInputs = 2 * kHalfInputs;

constexpr int64_t kCacheLine = 64;

template <class Bits>
struct Chunk {
  uint64_t metadata[2][kRowPairs];
  Bits values[2][kRowPairs][kHalfInputs];
};
static_assert(sizeof(Chunk<uint16_t>) == 576, "9 bits a weight");
static_assert(sizeof(Chunk<uint32_t>) == 1088, "17 bits a weight");
static_assert(offsetof(Chunk<uint16_t>, values) == 64 && offsetof(Chunk<uint32_t>, values) == 64,
              "values start on a cache line");

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t blocks_of(int64_t rows) { return ceil_div(rows, kBlockRows); }
constexpr int64_t chunks_of(int64_t cols) { return ceil_div(cols, kChunkInputs); }

// Bytes of the tiled of a (rows, cols) weight.
int64_t tiled_bytes(Dtype, int64_t rows, int64_t cols);

// Asks for huge pages under memory that is about to be written; a hint, without effect where it is not understood.
void advise_huge_pages(void* begin, int64_t bytes);

// Lets go of the whole pages within, which are read from their file again if need be; only for mapped files.
void drop_pages(uintptr_t begin, int64_t bytes);

// Blocks [first, last) of the tiled from the canonical pair of tensors (sparse24.h), and back; exact inverses.
// The pair comes from a file, so it is checked on the way: false when a nibble, an unused one or a value breaks the
// format. Which one that is, is for the slow check to say.
bool to_tiled(Dtype, const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* tiled,
               int64_t first, int64_t last);
void from_tiled(Dtype, const void* tiled, int64_t rows, int64_t cols, void* values, uint8_t* metadata, int64_t first,
                 int64_t last);

}  // namespace swiftprune
