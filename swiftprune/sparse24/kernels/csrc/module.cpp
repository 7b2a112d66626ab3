// Python bindings on raw addresses. Shapes, dtypes and contiguity are checked by the caller, native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "sparse24.h"

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
  nb::gil_scoped_release release;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  std::vector<Status> status(count);
  std::vector<std::thread> pool;
  const auto run = [&](int64_t i) { status[i] = work(rows * i / count, rows * (i + 1) / count); };
  for (int64_t i = 1; i < count; ++i) pool.emplace_back(run, i);
  run(0);
  for (auto& thread : pool) thread.join();
  for (const Status& s : status)
    if (s.fault != Fault::kNone) return {static_cast<int>(s.fault), s.index};
  return {0, 0};
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
}
