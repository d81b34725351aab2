// A team of parked threads that needs neither torch nor OpenMP. An extension that is compiled
// without -fopenmp runs at::parallel_for on one thread without saying so, and Apple's clang has no
// such flag.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace q4metal::cpu {

using ThreadTask = void (*)(void* context, int thread);

// Runs task(context, 0 .. count - 1), thread 0 being the caller, and returns when all are done.
// Callers on several threads take turns; a call from inside a task runs serially.
void run_on_team(int count, ThreadTask task, void* context);

// As run_on_team, but all parts run at the same time, so that they may wait for each other.
void run_together(int count, ThreadTask task, void* context);

// A lock for std::lock_guard that a forked child can take although another thread of its parent
// held it: that thread does not exist in the child, where a std::mutex would stay locked for ever.
class ForkSafeLock {
public:
  void lock();
  void unlock();

private:
  std::atomic<uint32_t> holder_{0}; // the generation of the process whose thread holds it
};

// Where `count` threads of run_together wait for each other. Spins for a while (a step of decoding
// takes microseconds) and then gives the core up: with more threads than cores somebody else needs
// it.
class Barrier {
public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

private:
  const int count_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// Calls body(begin, end), or body(begin, end, thread), for pieces of [0, size) of `piece` elements,
// handed out from an atomic counter: a thread that the machine slows down takes fewer pieces.
template <typename Body>
void parallel_pieces(int threads, int64_t size, int64_t piece, const Body& body) {
  const int64_t pieces = (size + piece - 1) / piece;
  const int count = int(std::min<int64_t>(threads, pieces));
  const auto call = [](const Body& body, int64_t begin, int64_t end, int thread) {
    if constexpr (std::is_invocable_v<const Body&, int64_t, int64_t, int>)
      body(begin, end, thread);
    else
      body(begin, end);
  };
  if (count <= 1) {
    for (int64_t begin = 0; begin < size; begin += piece)
      call(body, begin, std::min(begin + piece, size), 0);
    return;
  }
  struct Work {
    std::atomic<int64_t> next{0};
    int64_t size, piece;
    const Body* body;
  } work;
  work.size = size;
  work.piece = piece;
  work.body = &body;
  run_on_team(
      count,
      [](void* context, int thread) {
        auto& shared = *static_cast<Work*>(context);
        for (;;) {
          const int64_t begin = shared.next.fetch_add(1, std::memory_order_relaxed) * shared.piece;
          if (begin >= shared.size)
            return;
          decltype(call)()(*shared.body, begin, std::min(begin + shared.piece, shared.size),
                           thread);
        }
      },
      &work);
}

} // namespace q4metal::cpu
