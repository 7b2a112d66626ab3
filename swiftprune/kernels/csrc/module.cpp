// Python bindings on raw addresses. Shapes, dtypes and contiguity are checked by the caller, native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "ewma.h"
#include "linear24.h"
#include "quantized.h"
#include "sparse24.h"
#include "tiled.h"
#include "threads.h"

namespace nb = nanobind;
using namespace swiftprune;

namespace {

template <class P>
P at(uintptr_t address) { return reinterpret_cast<P>(address); }

const Kernels& kernels_or_throw(const std::string& isa) {
  const Kernels* kernels = kernels_for(isa.c_str());
  if (!kernels) throw std::invalid_argument("this CPU cannot run the '" + isa + "' kernels");
  return *kernels;
}

// Splits rows over threads; of several faults the one in the earliest row is reported, whatever the thread count.
template <class F>
std::pair<int, int64_t> over_rows(int64_t rows, int threads, F work) {
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  std::vector<Status> status(count);
  nb::gil_scoped_release release;
  in_parallel(static_cast<int>(count), [&](int i) {
    const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
    if constexpr (std::is_void_v<decltype(work(begin, end))>)  // what cannot fail
      work(begin, end);
    else
      status[i] = work(begin, end);
  });
  for (const Status& s : status)
    if (s.fault != Fault::kNone) return {static_cast<int>(s.fault), s.index};
  return {0, 0};
}

// The float with exactly `rank` of the `count` values below it, ties aside: two rounds of counting, no sort.
float kth_value(const float* values, int64_t count, int64_t rank, int threads) {
  constexpr int64_t kBins = 1 << 16;
  int64_t prefix = -1;
  uint32_t key = 0;
  for (int round = 0; round < 2; ++round) {
    std::vector<int64_t> counts(kBins * threads);
    in_parallel(threads, [&](int i) {
      count_keys(values, count * i / threads, count * (i + 1) / threads, prefix, counts.data() + kBins * i);
    });
    int64_t bin = 0;
    for (; bin < kBins; ++bin) {
      int64_t inside = 0;
      for (int i = 0; i < threads; ++i) inside += counts[kBins * i + bin];
      if (rank < inside) break;
      rank -= inside;
    }
    bin = std::min(bin, kBins - 1);
    prefix = bin;
    key = key << 16 | static_cast<uint32_t>(bin);
  }
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Reads memory once and returns something that depends on every word: the yardstick of the linear kernels. Sixteen words
// at a time fit the registers of every CPU.
uint64_t read_pass(const uint64_t* memory, int64_t bytes, int threads) {
  constexpr int64_t kWords = 16;
  const int64_t steps = bytes / static_cast<int64_t>(kWords * sizeof(uint64_t));
  std::vector<uint64_t> results(threads);
  in_parallel(threads, [&](int i) {
    uint64_t sums[kWords] = {};
    const uint64_t* end = memory + steps * (i + 1) / threads * kWords;
    for (const uint64_t* p = memory + steps * i / threads * kWords; p < end; p += kWords)
      for (int64_t j = 0; j < kWords; ++j) sums[j] ^= p[j];
    for (uint64_t sum : sums) results[i] ^= sum;
  });
  uint64_t result = 0;
  for (uint64_t r : results) result ^= r;
  return result;
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("NOT_FINITE") = static_cast<int>(Fault::kNotFinite);
  m.attr("TOO_MANY_NON_ZEROS") = static_cast<int>(Fault::kTooManyNonZeros);
  m.attr("BAD_METADATA") = static_cast<int>(Fault::kBadMetadata);

  m.def("supports", [](const std::string& isa) { return kernels_for(isa.c_str()) != nullptr; });

  m.def("prune_pack", [](const std::string& isa, int dtype, uintptr_t weight, int64_t rows, int64_t cols,
                         uintptr_t column, uintptr_t cross, uintptr_t row, uintptr_t curvature, uintptr_t values,
                         uintptr_t metadata, int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    const Factors factors{at<const float*>(column), at<const float*>(cross), at<const float*>(row),
                          at<const float*>(curvature)};
    return over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      return kernels.prune_pack(static_cast<Dtype>(dtype), at<const void*>(weight), cols, factors, at<void*>(values),
                                at<uint8_t*>(metadata), begin, end);
    });
  });

  m.def("pack", [](const std::string& isa, int dtype, uintptr_t weight, int64_t rows, int64_t cols, uintptr_t values,
                   uintptr_t metadata, int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    return over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      return kernels.pack(static_cast<Dtype>(dtype), at<const void*>(weight), cols, at<void*>(values),
                          at<uint8_t*>(metadata), begin, end);
    });
  });

  m.def("unpack", [](const std::string& isa, int dtype, uintptr_t values, uintptr_t metadata, int64_t rows,
                     int64_t cols, uintptr_t weight, int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    return over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      return kernels.unpack(static_cast<Dtype>(dtype), at<const void*>(values), at<const uint8_t*>(metadata), cols,
                            at<void*>(weight), begin, end);
    });
  });

  m.def("ewma_zscore", [](const std::string& isa, uintptr_t score, int64_t rows, int64_t cols, uintptr_t mean0,
                       uintptr_t deviation0, float mean_gain, float deviation_gain, float floor, uintptr_t ewma_zscore,
                       int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      kernels.ewma_zscore(at<const float*>(score), cols, at<const float*>(mean0), at<const float*>(deviation0),
                       EwmaGains{mean_gain, deviation_gain, floor}, at<float*>(ewma_zscore), begin, end);
    });
  });

  m.def("prune_columns", [](const std::string& isa, uintptr_t keep, int64_t kept, int64_t group, uintptr_t weight,
                            uintptr_t factor, int64_t rows, int64_t cols, uintptr_t pruned, uintptr_t errors,
                            int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      kernels.prune_columns(at<const uint8_t*>(keep), kept, group, at<const float*>(weight), at<const float*>(factor),
                            cols, at<float*>(pruned), at<float*>(errors), begin, end);
    });
  });

  m.def("int4_scales", [](const std::string& isa, uintptr_t weight, int64_t rows, int64_t cols, uintptr_t importance,
                          uintptr_t scales, int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      kernels.int4_scales(at<const float*>(weight), cols, at<const float*>(importance), at<uint16_t*>(scales), begin, end);
    });
  });

  m.def("round_columns", [](const std::string& isa, int bits, uintptr_t weight, uintptr_t keep, uintptr_t factor,
                            uintptr_t scales, int64_t rows, int64_t cols, uintptr_t values, uintptr_t errors,
                            int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      kernels.round_columns(bits, at<const float*>(weight), at<const uint8_t*>(keep), at<const float*>(factor),
                            at<const uint16_t*>(scales), cols, at<uint8_t*>(values), at<float*>(errors), begin, end);
    });
  });

  m.def("descend_columns", [](const std::string& isa, uintptr_t gradient, uintptr_t keep, uintptr_t gram, uintptr_t scales,
                              int64_t rows, int64_t cols, uintptr_t values, uintptr_t stored, int threads) {
    const Kernels& kernels = kernels_or_throw(isa);
    over_rows(rows, threads, [&](int64_t begin, int64_t end) {
      kernels.descend_columns(at<const float*>(gradient), at<const uint8_t*>(keep), at<const float*>(gram),
                              at<const uint16_t*>(scales), cols, at<uint8_t*>(values), at<float*>(stored), begin, end);
    });
  });

  m.def("kth_value", [](uintptr_t values, int64_t count, int64_t rank, int threads) {
    nb::gil_scoped_release release;
    return kth_value(at<const float*>(values), count, rank, threads);
  });

  m.def("use_openmp_of", [](const std::string& library) { return use_openmp_of(library.c_str()); });

  nb::list linear_isas;
  for (const char* isa : kLinearIsas) linear_isas.append(isa);
  m.attr("LINEAR_ISAS") = nb::tuple(linear_isas);
  m.attr("BYTES_PER_THREAD") = kBytesPerThread;

  // The address of a linear kernel, or 0 when this CPU cannot run it or it has none for the dtype.
  m.def("linear24_for", [](const std::string& isa, int dtype) {
    const auto of = static_cast<Dtype>(dtype);
    return reinterpret_cast<uintptr_t>(linear24_for(isa.c_str(), of, of));
  });

  m.def("tiled_bytes", [](int dtype, int64_t rows, int64_t cols) {
    return tiled_bytes(static_cast<Dtype>(dtype), rows, cols);
  });

  m.def("to_tiled", [](int dtype, uintptr_t values, uintptr_t metadata, int64_t rows, int64_t cols, uintptr_t tiled,
                        int threads) {
    advise_huge_pages(at<void*>(tiled), tiled_bytes(static_cast<Dtype>(dtype), rows, cols));
    const auto found = over_rows(blocks_of(rows), threads, [&](int64_t first, int64_t last) {
      const bool valid = to_tiled(static_cast<Dtype>(dtype), at<const void*>(values), at<const uint8_t*>(metadata),
                                   rows, cols, at<void*>(tiled), first, last);
      return valid ? Status{} : Status{Fault::kBadMetadata, first};
    });
    return static_cast<Fault>(std::get<0>(found)) == Fault::kNone;
  });

  m.def("drop_pages", [](uintptr_t begin, int64_t bytes) { drop_pages(begin, bytes); });

  m.def("from_tiled", [](int dtype, uintptr_t tiled, int64_t rows, int64_t cols, uintptr_t values,
                          uintptr_t metadata, int threads) {
    over_rows(blocks_of(rows), threads, [&](int64_t first, int64_t last) {
      from_tiled(static_cast<Dtype>(dtype), at<const void*>(tiled), rows, cols, at<void*>(values),
                  at<uint8_t*>(metadata), first, last);
    });
  });

  m.def("linear24", [](uintptr_t kernel, int dtype, int y_dtype, uintptr_t tiled, uintptr_t bias, uintptr_t x,
                       int64_t x_stride, uintptr_t y, int64_t tokens, int64_t rows, int64_t cols, int threads) {
    const swiftprune_linear24_args args{dtype, dtype, y_dtype, at<const void*>(tiled), at<const void*>(bias),
                                        at<const void*>(x), x_stride, at<void*>(y), rows, tokens, rows, cols};
    const auto run = at<swiftprune_linear24_fn>(kernel);
    const int64_t blocks = blocks_of(rows);
    const auto count = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
    nb::gil_scoped_release release;
    in_parallel(count, [&](int i) { run(&args, blocks * i / count, blocks * (i + 1) / count); });
  });

  nb::list quant_isas;
  for (const char* isa : kQuantIsas)
    if (quant_kernel_for(isa)) quant_isas.append(isa);
  m.attr("QUANT_ISAS") = nb::tuple(quant_isas);

  m.def("quant_kernel", [](const std::string& isa) { return reinterpret_cast<uintptr_t>(quant_kernel_for(isa.c_str())); });

  m.def("quant_bytes", [](int bits, int64_t rows, int64_t cols) { return quant_bytes(bits, rows, cols); });

  m.def("to_quant_tiled", [](int bits, uintptr_t values, uintptr_t metadata, uintptr_t scales, int64_t rows, int64_t cols,
                             uintptr_t tiled, int threads) {
    advise_huge_pages(at<void*>(tiled), quant_bytes(bits, rows, cols));
    const auto found = over_rows(blocks_of(rows), threads, [&](int64_t first, int64_t last) {
      const bool valid = to_quant_tiled(bits, at<const uint8_t*>(values), at<const uint8_t*>(metadata),
                                        at<const uint16_t*>(scales), rows, cols, at<void*>(tiled), first, last);
      return valid ? Status{} : Status{Fault::kBadMetadata, first};
    });
    return static_cast<Fault>(std::get<0>(found)) == Fault::kNone;
  });

  m.def("from_quant_tiled", [](int bits, uintptr_t tiled, int64_t rows, int64_t cols, uintptr_t values, uintptr_t metadata,
                               uintptr_t scales, int threads) {
    over_rows(blocks_of(rows), threads, [&](int64_t first, int64_t last) {
      from_quant_tiled(bits, at<const void*>(tiled), rows, cols, at<uint8_t*>(values), at<uint8_t*>(metadata),
                       at<uint16_t*>(scales), first, last);
    });
  });

  m.def("quant24", [](uintptr_t kernel, int bits, int x_dtype, uintptr_t tiled, uintptr_t bias, uintptr_t x,
                      int64_t x_stride, uintptr_t y, int64_t tokens, int64_t rows, int64_t cols, int threads) {
    nb::gil_scoped_release release;
    run_quant24(*at<const QuantKernel*>(kernel),
                {bits, x_dtype, at<const void*>(tiled), at<const void*>(bias), at<const void*>(x), x_stride, at<void*>(y),
                 rows, tokens, rows, cols, {}},
                threads);
  });

  m.def("read_bandwidth_pass", [](uintptr_t memory, int64_t bytes, int threads) {
    nb::gil_scoped_release release;
    return read_pass(at<const uint64_t*>(memory), bytes, threads);
  });
}
