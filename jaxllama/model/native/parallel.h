// Work shared with the threads of a pool: XLA's, or another.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "simd.h"

namespace jaxllama {

// Threads of a pool that stay together for several jobs, so that only the first one wakes them.
class Team {
 public:
  // `pool` has num_threads() and Schedule(work), and shares its threads among so many callers.
  template <typename Pool>
  explicit Team(Pool& pool, int64_t num_callers = 1)
      : num_threads_(std::max<int64_t>(1, pool.num_threads() / num_callers)), jobs_(std::make_shared<Jobs>()) {
    for (int64_t i = 1; i < num_threads_; ++i) pool.Schedule([jobs = jobs_] { jobs->HelpUntilClosed(); });
  }
  ~Team() { jobs_->is_closed.store(true, std::memory_order_release); }
  Team(const Team&) = delete;

  int64_t num_threads() const { return num_threads_; }

  // Runs body(0), body(1), … body(count - 1) on this thread and on those of the pool that are free, and returns when all
  // have ended. It waits only for threads that have begun, so calls may be nested in the pool without a deadlock.
  template <typename Body>
  void For(int64_t count, const Body& body) {
    if (count == 1) return body(0);
    // Nobody takes a part of the last job by the count of this one.
    jobs_->next.exchange(++number_ << 32 | kNone, std::memory_order_acq_rel);
    jobs_->body.store(&body, std::memory_order_relaxed);
    jobs_->call.store([](const void* of, int64_t i) { (*static_cast<const Body*>(of))(i); }, std::memory_order_relaxed);
    jobs_->count.store(count, std::memory_order_relaxed);
    jobs_->ended.store(0, std::memory_order_relaxed);
    jobs_->next.store(number_ << 32, std::memory_order_release);
    while (jobs_->Help()) {
    }
    for (int spins = 0; jobs_->ended.load(std::memory_order_acquire) < count;) Wait(&spins);
  }

 private:
  static constexpr uint64_t kNone = 0xffffffffu;

  static void Wait(int* spins) {
    if (++*spins < 4096) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }

  struct Jobs {
    std::atomic<const void*> body{nullptr};
    std::atomic<void (*)(const void*, int64_t)> call{nullptr};
    std::atomic<int64_t> count{0}, ended{0};
    std::atomic<uint64_t> next{0};  // the job's number, and in the lower half which part of it is to be done next
    std::atomic<bool> is_closed{false};
    const std::thread::id owner = std::this_thread::get_id();

    // Does a part of the present job; false if none is left. Who takes a part has read what belongs to it: the next job
    // is written only when all parts of this one have ended.
    bool Help() {
      uint64_t now = next.load(std::memory_order_acquire);
      for (;;) {
        const int64_t i = now & kNone;
        if (i >= count.load(std::memory_order_relaxed)) return false;
        const auto run = call.load(std::memory_order_relaxed);
        const void* of = body.load(std::memory_order_relaxed);
        if (!next.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        run(of, i);
        ended.fetch_add(1, std::memory_order_release);
        return true;
      }
    }

    // A pool whose queue is full (Eigen's) runs work at once, in the thread that came to schedule it: that one would wait
    // here for itself.
    void HelpUntilClosed() {
      if (std::this_thread::get_id() == owner) return;
      for (int spins = 0; !is_closed.load(std::memory_order_acquire);) {
        if (Help()) {
          spins = 0;
        } else {
          Wait(&spins);
        }
      }
    }
  };

  int64_t num_threads_;
  uint64_t number_ = 0;
  std::shared_ptr<Jobs> jobs_;
};

}  // namespace jaxllama
