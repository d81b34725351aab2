// Runs the threads of one threadgroup after another as fibers of this operating system thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "context.h"
#include "fiber.h"
#include "msl.h"

namespace msl {

#ifdef MSL_CHECK
constexpr bool kChecks = true;
#else
constexpr bool kChecks = false;
#endif

constexpr uint32_t kSimdWidth = 32, kSlotBytes = 2048;
constexpr uint64_t kThreadgroupLimit = 32 * 1024, kArena = 80 * 1024;
constexpr uint32_t kThreadgroupArguments = 8, kMaxThreads = 1024;
// Threads that a threadgroup may have whatever registers the compiler gives to each: of an M1's
// 208 KB, 128 of 4 bytes. More are a matter of luck without max_total_threads_per_threadgroup.
constexpr uint32_t kSafeThreads = 384;

enum class State : uint8_t { kRuns, kInSimdgroup, kAtBarrier, kDone };

struct Lane {
  void* stack_pointer;
  State state;
  msl_site site; // where it waits
  msl_context context;
};

struct Simdgroup {
  uint32_t first, count, arrived, parity;
  msl_site site;
  // Two sets: a lane may still read the results of one meeting while another fills the next.
  alignas(64) char slots[2][kSlotBytes];
};

struct Variable {
  const void* key;
  char* data;
};

struct Executor {
  const msl_dispatch* dispatch = nullptr;
  const msl_kernel_entry* kernel = nullptr;
  Stacks stacks;
  std::vector<Lane> lanes;
  std::vector<Simdgroup> simdgroups;
  std::vector<uint32_t> order, position; // of the threads in this threadgroup's schedule
  void* main_stack = nullptr;
  bool in_fibers = false;
  uint32_t current = 0, count = 0, done = 0;
  uint32_t at_barrier = 0;
  msl_site barrier_site{};
  std::vector<Variable> variables;
  std::vector<void*> buffers; // what the kernel gets for [[buffer(n)]]
  char* arguments[kThreadgroupArguments] = {};
  uint64_t arena_used = 0, arena_counted = 0;
  uint64_t switches = 0, barriers = 0, most_threadgroup_memory = 0;
  std::string error;
  alignas(256) char arena[kArena];

  void run_threadgroup(const uint32_t at[3], const uint32_t grid[3], const uint32_t full[3]);
  char* allocate(const void* key, uint64_t size, uint64_t align, const char* name);

private:
  void prepare(const uint32_t at[3], const uint32_t grid[3], const uint32_t full[3]);
  void prepare_lane(uint32_t i, const uint32_t at[3], const uint32_t size[3],
                    const uint32_t grid[3], const uint32_t full[3]);
  void schedule();
};

extern Executor* executor; // of the dispatch that runs

// Ends the dispatch with `message` (the first one counts). Doesn't return: the fibers are
// abandoned.
[[noreturn]] void fail(const std::string& message);
// "thread 3 of threadgroup (0,1,0)"
std::string who();
std::string where(const msl_site& site);

// A source of numbers for the shuffled order; the same on every machine.
class Random {
public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t below(uint32_t bound) {
    state_ = state_ * 1664525u + 1013904223u;
    return (state_ >> 8) % bound;
  }
  void shuffle(uint32_t* first, uint32_t count) {
    for (uint32_t i = count; i > 1; i--)
      std::swap(first[i - 1], first[below(i)]);
  }

private:
  uint32_t state_;
};

extern Random shuffler;

} // namespace msl
