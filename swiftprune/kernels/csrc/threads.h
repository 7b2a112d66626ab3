// Work on several threads: torch's own OpenMP team where the process has one, so that two pools never fight for cores.
#pragma once

#include <cstdint>
#include <functional>

namespace swiftprune {

// Uses the OpenMP runtime that `library` (libtorch_cpu) is linked with from now on. False when it has none that offers
// GOMP_parallel; threads are then started for each call.
bool use_openmp_of(const char* library);

// Runs work(i) for every i in [0, count), each on a thread of its own, and returns when all are done.
void in_parallel(int count, const std::function<void(int)>& work);

}  // namespace swiftprune
