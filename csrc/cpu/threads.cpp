#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace q4metal::cpu {
namespace {

// A worker that sleeps is late: waking it takes the caller 30 us and the worker another 40 (Zen 4,
// a virtual machine). So it stays awake between two tokens, or two operators of a model's modules:
// for so many pauses (some 20 us), then for so long as it lets others have the core.
constexpr int kSpins = 1000;
constexpr std::chrono::microseconds kYielding(500);

// Between the steps of one token somebody is always about to arrive. With 1000 pauses 90 of 152
// waits a token ended in the kernel, some 20 us each, and a second thread gained a third instead of
// two thirds.
constexpr int kBarrierSpins = 10000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Returns once `value` differs from `old`.
template <typename T> void wait_while(std::atomic<T>& value, T old, int spins = kSpins) {
  const auto differs = [&] { return value.load(std::memory_order_acquire) != old; };
  for (int i = 0; i < spins; ++i) {
    if (differs())
      return;
    pause();
  }
  const auto end = std::chrono::steady_clock::now() + kYielding;
  while (std::chrono::steady_clock::now() < end) {
    if (differs())
      return;
    sched_yield();
  }
  while (!differs())
    value.wait(old, std::memory_order_acquire);
}

thread_local bool inside_task = false;

// What a worker is doing. The caller posts; the worker takes the post and goes back to idle, unless
// the caller, done with its own part, takes the post back and does that part itself.
enum State : uint32_t { kIdle, kPosted, kRunning };

class Team {
public:
  // `together`: no part is taken back from a late worker.
  void run(int count, ThreadTask task, void* context, bool together) {
    std::lock_guard<std::mutex> turn(mutex_);
    while (int(workers_.size()) < count - 1)
      add_worker();
    task_ = task;
    context_ = context;
    for (int i = 0; i < count - 1; ++i) {
      workers_[i]->state.store(kPosted, std::memory_order_release);
      workers_[i]->state.notify_one();
    }
    inside_task = true;
    task(context, 0);
    for (int i = 0; i < count - 1; ++i) {
      // On a busy machine a worker may not get a core for milliseconds: its part does not wait for
      // it.
      uint32_t expected = kPosted;
      if (!together &&
          workers_[i]->state.compare_exchange_strong(expected, kIdle, std::memory_order_acq_rel)) {
        task(context, i + 1);
        continue;
      }
      wait_while(workers_[i]->state, uint32_t(kPosted));
      wait_while(workers_[i]->state, uint32_t(kRunning));
    }
    inside_task = false;
  }

private:
  struct alignas(64) Worker {
    std::atomic<uint32_t> state{kIdle};
  };

  void add_worker() {
    workers_.push_back(std::make_unique<Worker>());
    Worker* worker = workers_.back().get();
    const int thread = int(workers_.size());
    // Detached and never joined: the team outlives every static destructor.
    std::thread([this, worker, thread] {
      inside_task = true;
      for (;;) {
        wait_while(worker->state, uint32_t(kIdle));
        uint32_t expected = kPosted;
        if (!worker->state.compare_exchange_strong(expected, kRunning, std::memory_order_acq_rel))
          continue; // taken back
        task_(context_, thread);
        worker->state.store(kIdle, std::memory_order_release);
        worker->state.notify_one();
      }
    }).detach();
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  ThreadTask task_ = nullptr;
  void* context_ = nullptr;
};

// Leaked on purpose, see add_worker. A forked child has none of the threads: it starts a new team.
std::atomic<Team*> team{nullptr};
std::atomic<uint32_t> generation{1}; // of this process: forks that led to it

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] {
    team.store(new Team);
    pthread_atfork(nullptr, nullptr, [] {
      team.store(new Team);
      generation.fetch_add(1);
    });
  });
}

Team& current_team() {
  watch_forks();
  return *team.load();
}

} // namespace

void run_on_team(int count, ThreadTask task, void* context) {
  if (count <= 1 || inside_task) {
    for (int thread = 0; thread < count; ++thread)
      task(context, thread);
    return;
  }
  current_team().run(count, task, context, false);
}

void run_together(int count, ThreadTask task, void* context) {
  if (count <= 1)
    return task(context, 0);
  current_team().run(count, task, context, true);
}

void ForkSafeLock::lock() {
  watch_forks();
  const uint32_t own = generation.load();
  for (;;) {
    uint32_t holder = 0;
    if (holder_.compare_exchange_strong(holder, own, std::memory_order_acq_rel))
      return;
    if (holder == own)
      holder_.wait(own, std::memory_order_acquire);
    else if (holder_.compare_exchange_strong(holder, own, std::memory_order_acq_rel))
      return; // its thread was left behind in the parent
  }
}

void ForkSafeLock::unlock() {
  holder_.store(0, std::memory_order_release);
  holder_.notify_one();
}

void Barrier::wait() {
  const uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    round_.notify_all();
    return;
  }
  wait_while(round_, round, kBarrierSpins);
}

} // namespace q4metal::cpu
