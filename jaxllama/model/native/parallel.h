// Work shared with the threads of a pool, XLA's or another with its two methods.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "simd.h"

namespace {

// Runs body(0), body(1), … body(count - 1) on this thread and on those of the pool that are free, and returns when all
// have ended. It waits only for threads that have begun, so calls may be nested in the pool without a deadlock.
template <typename Pool, typename Body>
void ParallelFor(Pool& pool, int64_t count, const Body& body) {
  struct Work {
    const Body* body;
    int64_t count;
    std::atomic<int64_t> begun{0}, ended{0};
    void Help() {
      for (int64_t i; (i = begun.fetch_add(1)) < count;) {
        (*body)(i);
        ended.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto work = std::make_shared<Work>();
  work->body = &body;
  work->count = count;
  // The calling thread takes part beside the pool's.
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Help(); });
  work->Help();
  for (int spins = 0; work->ended.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 4096) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace
