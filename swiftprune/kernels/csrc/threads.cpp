#include "threads.h"

#ifndef _WIN32
#include <dlfcn.h>
#endif

#include <atomic>
#include <thread>
#include <vector>

namespace swiftprune {
namespace {

// The C interface that code compiled by GCC calls for `#pragma omp parallel`; LLVM's and Intel's runtimes offer it too.
// It is looked up rather than linked: torch's wheels bring a copy of their own, and a second one is a second pool.
using GompParallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);
GompParallel gomp_parallel = nullptr;

struct Team {
  const std::function<void(int)>& work;
  int count;
  std::atomic<int> next{0};
};

// A team may be smaller than asked for, so its members take what is left until nothing is.
void take_turns(void* data) {
  auto& team = *static_cast<Team*>(data);
  for (int i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.count;) team.work(i);
}

}  // namespace

bool use_openmp_of([[maybe_unused]] const char* library) {
#ifndef _WIN32
  // What LD_PRELOAD brings (Intel's runtime, which vLLM recommends) comes first, for that library too; then the library
  // and what it needs.
  if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
    void* function = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    gomp_parallel = reinterpret_cast<GompParallel>(function ? function : dlsym(handle, "GOMP_parallel"));
  }
#endif
  return gomp_parallel != nullptr;
}

void in_parallel(int count, const std::function<void(int)>& work) {
  if (count == 1) return work(0);
  Team team{work, count};
  if (gomp_parallel) return gomp_parallel(take_turns, &team, static_cast<unsigned>(count), 0);
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back(take_turns, &team);
  take_turns(&team);
  for (auto& thread : threads) thread.join();
}

}  // namespace swiftprune
