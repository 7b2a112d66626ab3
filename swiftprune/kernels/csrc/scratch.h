// Memory that a kernel works in.
// In an anonymous namespace, so that no file can pick up code compiled for another file's ISA.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "tiled.h"

namespace swiftprune {
namespace {

// Memory that stays with its thread, so that a call allocates nothing after the first of its size.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const int64_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(T)), kCacheLine) * kCacheLine;
    if (bytes > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(kCacheLine, bytes);
      size_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }
  ~Scratch() { std::free(memory_); }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace swiftprune
