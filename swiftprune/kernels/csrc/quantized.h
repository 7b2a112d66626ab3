// y = x W^T + b over a packed 2:4 weight with 8- or 4-bit values: the layout that its kernels read, and their interface.
//
// Rows are taken eight at a time (a block) and inputs 128 at a time (a chunk), in halves of 64; chunk (b, c) stands at
// b * chunks + c. Rows and inputs are filled up with zeros. Rows are paired (A, B). Of a half and a pair of rows there are
// 64 values, in four lanes of 16 bytes. Lane s is of the inputs 16 s .. 16 s + 15, which are four groups:
//
//   values    A of groups 0, 1 | B of groups 0, 1 | A of groups 2, 3 | B of groups 2, 3      (two a group, pos0 first)
//
// so that a value finds its input within its own lane, each 32-bit word has one row, and rows alternate. 4-bit values of
// the two halves share bytes, the first half in the low bits. The positions, two bits each, are the canonical bytes of
// metadata (two groups of one row each), in the order that one multishift per 64 bits spreads out:
//
//   metadata  A0 B0 A2 B2 A4 B4 A6 B6 | A1 B1 A3 B3 A5 B5 A7 B7     Ai: groups 2 i and 2 i + 1 of row A in this half
//
// Behind all chunks stand the scales in bfloat16: of 8-bit values one a row, of 4-bit values eight a chunk.
#pragma once

#include <cstdint>
#include <functional>

#include "sparse24.h"
#include "threads.h"
#include "tiled.h"

namespace swiftprune {

constexpr int64_t kQuantHalf = 64;
constexpr int64_t kQuantInputs = 2 * kQuantHalf;  // x has a scale for each so many, and 4-bit values have
constexpr int64_t kQuantMetadata = 16;            // bytes of a half and a pair of rows

// What a 4-bit value stands for, times its scale: format, "Codebook". 8-bit values stand for themselves.
constexpr int8_t kCodebook[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

template <int Bits>
struct QuantChunk {
  static constexpr int64_t kValueSets = Bits == 8 ? 2 : 1;
  uint8_t metadata[2][kRowPairs][kQuantMetadata];
  uint8_t values[kValueSets][kRowPairs][kQuantHalf];
};
static_assert(sizeof(QuantChunk<8>) == 640, "5 bits a weight");
static_assert(sizeof(QuantChunk<4>) == 384, "3 bits a weight");

constexpr int64_t quant_chunks(int64_t cols) { return ceil_div(cols, kQuantInputs); }
constexpr int64_t quant_scales(int bits, int64_t rows, int64_t cols) {
  return ceil_div(rows, kBlockRows) * kBlockRows * (bits == 8 ? 1 : quant_chunks(cols));
}
constexpr int64_t quant_chunk_bytes(int bits) { return bits == 8 ? sizeof(QuantChunk<8>) : sizeof(QuantChunk<4>); }
constexpr int64_t quant_bytes(int bits, int64_t rows, int64_t cols) {
  return ceil_div(rows, kBlockRows) * quant_chunks(cols) * quant_chunk_bytes(bits) +
         quant_scales(bits, rows, cols) * static_cast<int64_t>(sizeof(uint16_t));
}

// Lays out row blocks [first, last). `values` are (rows, cols / 2) int8, or (rows, cols / 4) bytes of two 4-bit values;
// `metadata` as in sparse24.h; `scales` (rows) or (rows, quant_chunks(cols)) bfloat16. False when a nibble of metadata, a
// scale or a value of -128 breaks the format; which one that is, is for the slow check to say.
bool to_quant_tiled(int bits, const uint8_t* values, const uint8_t* metadata, const uint16_t* scales, int64_t rows,
                    int64_t cols, void* tiled, int64_t first, int64_t last);
// And back, bit for bit.
void from_quant_tiled(int bits, const void* tiled, int64_t rows, int64_t cols, uint8_t* values, uint8_t* metadata,
                      uint16_t* scales, int64_t first, int64_t last);

// x, rounded to 8 bits for each token and each chunk of inputs, in the order in which a kernel's product reads it: tiles of
// tokens, in each chunk by chunk, in each token by token. x is about scale * (byte - offset), the offset the kernel's own.
struct QuantInput {
  uint8_t* bytes;  // kQuantInputs for each token and chunk
  float* scales;   // one for each token and chunk
};

}  // namespace swiftprune

extern "C" {

struct swiftprune_quant24_args {
  int bits;     // of the values: 8 or 4
  int x_dtype;  // swiftprune::Dtype of x, y and bias
  const void* tiled;
  const void* bias;  // (rows) or null
  const void* x;     // (tokens, cols), rows x_stride elements apart
  int64_t x_stride;
  void* y;  // (tokens, rows), rows y_stride elements apart; every element is written
  int64_t y_stride;
  int64_t tokens;
  int64_t rows;
  int64_t cols;
  swiftprune::QuantInput input;
};
}

namespace swiftprune {

struct QuantKernel {
  // Fills args.input of chunks [first, last).
  void (*quantize)(const swiftprune_quant24_args&, int64_t first, int64_t last);
  // The outputs of row blocks [first, last). How the blocks are divided among calls does not change a bit of the result.
  void (*multiply)(const swiftprune_quant24_args&, int64_t first, int64_t last);
};

constexpr const char* kQuantIsas[] = {"avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", "generic"};

// Runs work(i) for every i in [0, count), as in_parallel does.
using Parallel = std::function<void(int count, const std::function<void(int)>& work)>;

// The whole product in so many parts at once: the inputs are rounded once, for all of them.
void run_quant24(const QuantKernel&, swiftprune_quant24_args, int parts, const Parallel& parallel = in_parallel);

// Null when the name is unknown or this CPU (or its operating system) cannot run it.
const QuantKernel* quant_kernel_for(const char* isa);

extern const QuantKernel kQuantGeneric;
#ifdef SWIFTPRUNE_X86
extern const QuantKernel kQuantAvx2, kQuantAvxVnni, kQuantAvx512Vnni;
#endif
#ifdef SWIFTPRUNE_NEON
extern const QuantKernel kQuantNeonDotprod;
#endif

}  // namespace swiftprune
