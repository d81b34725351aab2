// How the threads of a pass share the work of its steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace q4metal::cpu {

class Shares {
public:
  // Before a pass. Allocates when there are more steps or threads than in any pass before.
  void start(int steps, int threads) {
    const size_t size = size_t(steps) * threads;
    if (taken_.size() < size)
      taken_ = std::vector<std::atomic<int64_t>>(size);
    for (auto& count : taken_)
      count.store(0, std::memory_order_relaxed);
    steps_ = steps;
    threads_ = threads;
  }

  // Calls body(i) for i of [0, count): those of the thread's own part, one after the other, so that
  // a core reads one stream of weights; then what is left of the others' parts.
  template <typename Body> void share(int step, int thread, int64_t count, const Body& body) {
    for (int other = 0; other < threads_; ++other) {
      const int owner = (thread + other) % threads_;
      auto& taken = taken_[size_t(owner) * steps_ + step];
      const int64_t first = first_of(count, owner), last = first_of(count, owner + 1);
      for (;;) {
        const int64_t i = first + taken.fetch_add(1, std::memory_order_relaxed);
        if (i >= last)
          break;
        body(i);
      }
    }
  }

  // Where the thread's own part begins.
  int64_t first_of(int64_t count, int thread) const { return count * thread / threads_; }

private:
  // [thread][step]: how much of that thread's part of the step is taken.
  std::vector<std::atomic<int64_t>> taken_;
  int steps_ = 0, threads_ = 0;
};

} // namespace q4metal::cpu
