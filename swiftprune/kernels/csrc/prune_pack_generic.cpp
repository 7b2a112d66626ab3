#include "group.h"

namespace swiftprune {
namespace {

// Leaves every group to the scalar twin.
template <class T>
struct Generic {
  using Bits = typename T::Bits;
  static int64_t prune_pack(const Bits*, int64_t, int64_t, const Factors&, Bits*, uint8_t*) { return 0; }
  static int64_t pack(const Bits*, int64_t, Bits*, uint8_t*) { return 0; }
  static int64_t unpack(const Bits*, const uint8_t*, int64_t, Bits*) { return 0; }
};

}  // namespace

const Kernels kGenericKernels = Table<Generic>::kernels;

}  // namespace swiftprune
