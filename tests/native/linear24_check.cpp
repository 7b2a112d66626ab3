// The linear kernels of every instruction set that runs here against double precision, over odd shapes in buffers of
// exactly their size: built with ASan and UBSan on this machine, and for other ones to run under emulation. Prints what
// it checked; exits with 1 at the first mistake.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "group.h"
#include "linear24.h"
#include "quantized.h"
#include "tiled.h"

using namespace swiftprune;

#ifndef CHECK_THREADS
#define CHECK_THREADS 3  // an emulator without threads sets 1
#endif

namespace {

uint64_t state = 1;
uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}
float random_float() { return static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f; }

// Exactly `count` elements on the heap, so that a read or write beyond them is seen.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : size(count), data(new T[count]) {}
  int64_t size;
  std::unique_ptr<T[]> data;
  T& operator[](int64_t i) { return data[i]; }
};

template <class T>
bool check(const char* isa, Dtype dtype, int64_t rows, int64_t cols, int64_t tokens, bool with_bias, double tolerance) {
  using Bits = typename T::Bits;
  const int64_t half = cols / 2, stride = (cols / 4 + 1) / 2, x_stride = cols + 3;
  Buffer<Bits> values(rows * half), x((tokens - 1) * x_stride + cols), y(tokens * rows), bias(rows), back(rows * half);
  Buffer<uint8_t> metadata(rows * stride), metadata_back(rows * stride);
  Buffer<float> sums(tokens * rows);
  std::fill_n(metadata.data.get(), metadata.size, uint8_t{0});
  for (int64_t i = 0; i < values.size; ++i) values[i] = T::from_float(random_float());
  for (int64_t i = 0; i < x.size; ++i) x[i] = T::from_float(random_float());
  for (int64_t i = 0; i < rows; ++i) bias[i] = T::from_float(random_float());
  constexpr uint8_t kNibbles[] = {4, 8, 12, 9, 13, 14};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < cols / 4; ++g)
      metadata[r * stride + g / 2] |= static_cast<uint8_t>(kNibbles[random_bits() % 6] << (g % 2 * 4));

  // new char[] is aligned to 16 bytes only, as a tiled weight in a foreign allocation may be.
  Buffer<char> tiled(tiled_bytes(dtype, rows, cols));
  const int64_t blocks = blocks_of(rows), middle = blocks / 2;
  to_tiled(dtype, values.data.get(), metadata.data.get(), rows, cols, tiled.data.get(), 0, middle);
  to_tiled(dtype, values.data.get(), metadata.data.get(), rows, cols, tiled.data.get(), middle, blocks);
  from_tiled(dtype, tiled.data.get(), rows, cols, back.data.get(), metadata_back.data.get(), 0, blocks);
  if (std::memcmp(back.data.get(), values.data.get(), values.size * sizeof(Bits)) != 0 ||
      std::memcmp(metadata_back.data.get(), metadata.data.get(), metadata.size) != 0) {
    std::printf("%s: the tiled %lldx%lld does not give the weight back\n", isa, (long long)rows, (long long)cols);
    return false;
  }

  const auto run = linear24_for(isa, dtype, dtype);
  if (!run) return true;
  swiftprune_linear24_args args{static_cast<int>(dtype), static_cast<int>(dtype), static_cast<int>(Dtype::kFloat32), tiled.data.get(),
                                with_bias ? bias.data.get() : nullptr, x.data.get(), x_stride, sums.data.get(), rows,
                                tokens, rows, cols};
  std::fill_n(sums.data.get(), sums.size, std::nanf(""));
  run(&args, 0, middle);
  run(&args, middle, blocks);
  args.y_dtype = static_cast<int>(dtype);
  args.y = y.data.get();
  run(&args, 0, blocks);
  double error = 0, norm = 1e-30;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = with_bias ? T::to_float(bias[r]) : 0;
      for (int64_t i = 0; i < half; ++i) {
        const int64_t g = i / 2;
        const int64_t at = 4 * g + (metadata[r * stride + g / 2] >> (g % 2 * 4 + i % 2 * 2) & 3);
        const double product = double(T::to_float(values[r * half + i])) * T::to_float(x[t * x_stride + at]);
        sum += product;
        norm += product * product;  // as large as the sums are where products do not cancel
      }
      const float got = sums[t * rows + r];
      error += (got - sum) * (got - sum);
      if (!(std::fabs(got - sum) < 1) || y[t * rows + r] != T::from_float(got)) error = 1e30;
    }
  if (std::sqrt(error / norm) <= tolerance) return true;
  std::printf("%s: dtype %d, %lldx%lld, %lld tokens: off by %g\n", isa, static_cast<int>(dtype), (long long)rows,
              (long long)cols, (long long)tokens, std::sqrt(error / norm));
  return false;
}

// Inputs that are whole numbers up to 127 round to themselves, and scales are powers of two: sums must be exact.
bool check_quantized(const char* isa, int bits, int64_t rows, int64_t cols, int64_t tokens, bool with_bias) {
  const int64_t half = cols / 2, stride = (cols / 4 + 1) / 2, x_stride = cols + 3, scales_each = bits == 8 ? 1 : quant_chunks(cols);
  Buffer<uint8_t> values(bits == 8 ? rows * half : rows * half / 2), back(values.size), metadata(rows * stride),
      metadata_back(metadata.size);
  Buffer<uint16_t> scales(rows * scales_each), scales_back(scales.size);
  Buffer<float> x((tokens - 1) * x_stride + cols), y(tokens * rows), bias(rows);
  std::fill_n(metadata.data.get(), metadata.size, uint8_t{0});
  for (int64_t i = 0; i < values.size; ++i)
    do values[i] = static_cast<uint8_t>(random_bits());
    while (bits == 8 && values[i] == 0x80);
  for (int64_t i = 0; i < scales.size; ++i) scales[i] = BFloat16::from_float(random_bits() % 2 ? 0.5f : -2.0f);
  for (int64_t i = 0; i < x.size; ++i) x[i] = static_cast<float>(static_cast<int>(random_bits() % 255) - 127);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < cols; k += kQuantInputs) x[t * x_stride + k] = 127;
  for (int64_t i = 0; i < rows; ++i) bias[i] = static_cast<float>(random_bits() % 9);
  constexpr uint8_t kNibbles[] = {4, 8, 12, 9, 13, 14};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < cols / 4; ++g)
      metadata[r * stride + g / 2] |= static_cast<uint8_t>(kNibbles[random_bits() % 6] << (g % 2 * 4));

  Buffer<char> tiled(quant_bytes(bits, rows, cols));
  const int64_t blocks = blocks_of(rows), middle = blocks / 2;
  bool right = to_quant_tiled(bits, values.data.get(), metadata.data.get(), scales.data.get(), rows, cols, tiled.data.get(), 0, middle);
  right &= to_quant_tiled(bits, values.data.get(), metadata.data.get(), scales.data.get(), rows, cols, tiled.data.get(), middle, blocks);
  from_quant_tiled(bits, tiled.data.get(), rows, cols, back.data.get(), metadata_back.data.get(), scales_back.data.get(), 0, blocks);
  right &= std::memcmp(back.data.get(), values.data.get(), values.size) == 0 &&
           std::memcmp(metadata_back.data.get(), metadata.data.get(), metadata.size) == 0 &&
           std::memcmp(scales_back.data.get(), scales.data.get(), scales.size * sizeof(uint16_t)) == 0;
  const QuantKernel* kernel = quant_kernel_for(isa);
  if (right && kernel) {
    std::fill_n(y.data.get(), y.size, std::nanf(""));
    run_quant24(*kernel, {bits, static_cast<int>(Dtype::kFloat32), tiled.data.get(), with_bias ? bias.data.get() : nullptr,
                          x.data.get(), x_stride, y.data.get(), rows, tokens, rows, cols, {}}, CHECK_THREADS);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < rows; ++r) {
        double sum = with_bias ? bias[r] : 0;
        for (int64_t i = 0; i < half; ++i) {
          const int64_t g = i / 2, at = 4 * g + (metadata[r * stride + g / 2] >> (g % 2 * 4 + i % 2 * 2) & 3);
          const int value = bits == 8 ? static_cast<int8_t>(values[r * half + i])
                                      : kCodebook[values[r * half / 2 + g] >> (i % 2 * 4) & 15];
          sum += double(BFloat16::to_float(scales[r * scales_each + (bits == 8 ? 0 : 4 * g / kQuantInputs)])) * value * x[t * x_stride + at];
        }
        right &= std::fabs(y[t * rows + r] - sum) <= 1e-6 * (std::fabs(sum) + 2e7);
      }
  }
  if (!right)
    std::printf("%s: %d bits, %lldx%lld, %lld tokens: wrong\n", isa, bits, (long long)rows, (long long)cols, (long long)tokens);
  return right;
}

}  // namespace

int main() {
  constexpr int64_t kShapes[][2] = {{1, 4}, {3, 12}, {8, 64}, {9, 68}, {17, 132}, {23, 1100}, {40, 2052}};
  constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 11, 33};
  for (const char* isa : {"generic", "neon", "avx2", "avx512", "avx512_bf16"}) {
    for (const auto& shape : kShapes)
      for (int64_t tokens : kTokens) {
        const bool bias = tokens % 2 == 1;
        if (!check<Float32>(isa, Dtype::kFloat32, shape[0], shape[1], tokens, bias, 1e-5) ||
            !check<Float16>(isa, Dtype::kFloat16, shape[0], shape[1], tokens, bias, 1e-5) ||
            !check<BFloat16>(isa, Dtype::kBFloat16, shape[0], shape[1], tokens, bias, 1e-5))
          return 1;
      }
    const bool ran = linear24_for(isa, Dtype::kBFloat16, Dtype::kBFloat16) != nullptr;
    std::printf("%s: %s\n", isa, ran ? "right" : "not here");
  }
  for (const char* isa : kQuantIsas) {
    for (const auto& shape : kShapes)
      for (int64_t tokens : kTokens)
        for (int bits : {8, 4})
          if (!check_quantized(isa, bits, shape[0], shape[1], tokens, tokens % 2 == 1)) return 1;
    std::printf("%s, 8 and 4 bits: %s\n", isa, quant_kernel_for(isa) ? "right" : "not here");
  }
  return 0;
}
