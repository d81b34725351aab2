#include "executor.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "checker.h"

extern "C" {
const msl_context* msl_self;
}

namespace msl {

Executor* executor;
Random shuffler(0);

namespace {

void switch_from(void** save, uint32_t to) {
  Executor& e = *executor;
  e.current = to;
  e.switches++;
  msl_self = &e.lanes[to].context;
  msl_switch(save, e.lanes[to].stack_pointer);
}

// "threads 0-15, 18"
std::string numbers(const std::vector<uint32_t>& threads) {
  std::string text = threads.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0, shown = 0; i < threads.size(); shown++) {
    size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1)
      j++;
    if (shown == 6)
      return text + ", ...";
    text += (shown ? ", " : "") + std::to_string(threads[i]);
    if (j > i)
      text += "-" + std::to_string(threads[j]);
    i = j + 1;
  }
  return text;
}

std::string doing(const Lane& lane) {
  if (lane.state == State::kDone)
    return "returned";
  if (lane.state == State::kRuns)
    return "running";
  return "waiting in " + where(lane.site);
}

[[noreturn]] void diverged() {
  const Executor& e = *executor;
  std::vector<std::pair<std::string, std::vector<uint32_t>>> groups;
  for (uint32_t i = 0; i < e.count; i++) {
    std::string what = doing(e.lanes[i]);
    size_t g = 0;
    while (g < groups.size() && groups[g].first != what)
      g++;
    if (g == groups.size())
      groups.push_back({what, {}});
    groups[g].second.push_back(i);
  }
  std::string message = "divergent control flow: ";
  for (size_t g = 0; g < groups.size(); g++)
    message += (g ? "; " : "") + numbers(groups[g].second) + " " + groups[g].first;
  const uint32_t* at = e.lanes[0].context.threadgroup_in_grid;
  fail(message + "; in threadgroup (" + std::to_string(at[0]) + "," + std::to_string(at[1]) + "," +
       std::to_string(at[2]) + ")");
}

// Goes on with the next thread that can run.
void reschedule() {
  Executor& e = *executor;
  uint32_t me = e.current, p = e.position[me];
  for (uint32_t k = 1; k <= e.count; k++) {
    if (++p == e.count)
      p = 0;
    uint32_t next = e.order[p];
    if (e.lanes[next].state != State::kRuns)
      continue;
    if (next != me)
      switch_from(&e.lanes[me].stack_pointer, next);
    return;
  }
  diverged();
}

void lane_main() {
  Executor& e = *executor;
  e.kernel->run();
  e.lanes[e.current].state = State::kDone;
  if (++e.done == e.count) {
    void* dead;
    msl_switch(&dead, e.main_stack);
  }
  reschedule();
  __builtin_trap();
}

bool same(const msl_site& a, const msl_site& b) {
  return a.line == b.line && a.what == b.what && a.file == b.file;
}

} // namespace

std::string where(const msl_site& site) {
  return std::string(site.what) + " at " + site.file + ":" + std::to_string(site.line);
}

std::string who() {
  const msl_context& c = *msl_self;
  return "thread " + std::to_string(c.thread_index) + " of threadgroup (" +
         std::to_string(c.threadgroup_in_grid[0]) + "," + std::to_string(c.threadgroup_in_grid[1]) +
         "," + std::to_string(c.threadgroup_in_grid[2]) + ")";
}

void fail(const std::string& message) {
  if (executor->error.empty())
    executor->error = message;
  void* dead;
  msl_switch(&dead, executor->main_stack);
  __builtin_trap();
}

char* Executor::allocate(const void* key, uint64_t size, uint64_t align, const char* name) {
  for (const Variable& v : variables)
    if (v.key == key)
      return v.data;
  uint64_t start = (arena_used + 15) & ~uint64_t{15};
  // No better aligned than its type asks, as in Apple's compiler: `threadgroup half a[]` is "align
  // 2" there.
  if (kChecks && align < 16)
    start += align;
  arena_counted = ((arena_counted + align - 1) & ~(align - 1)) + size;
  if (arena_counted > most_threadgroup_memory)
    most_threadgroup_memory = arena_counted;
  if (arena_counted > kThreadgroupLimit || start + size > kArena)
    fail("threadgroup memory: '" + std::string(name) + "' makes it " +
         std::to_string(arena_counted) + " bytes, the limit is 32768");
  char* data = arena + start;
  arena_used =
      start + size + 64; // a gap, so that running over the end of one array isn't in the next
  variables.push_back({key, data});
  memset(data, 0xFF, size); // NaN in every float type
  if constexpr (kChecks)
    checker::add_threadgroup_variable(data, size, name);
  return data;
}

void Executor::prepare_lane(uint32_t i, const uint32_t at[3], const uint32_t size[3],
                            const uint32_t grid[3], const uint32_t full[3]) {
  Lane& lane = lanes[i];
  lane.state = State::kRuns;
  msl_context& c = lane.context;
  const uint32_t in[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
  for (int d = 0; d < 3; d++) {
    c.thread_in_threadgroup[d] = in[d];
    c.threadgroup_in_grid[d] = at[d];
    c.thread_in_grid[d] = at[d] * full[d] + in[d];
    c.threads_per_threadgroup[d] = size[d];
    c.dispatch_threads_per_threadgroup[d] = full[d];
    c.threads_per_grid[d] = grid[d];
    c.threadgroups_per_grid[d] = (grid[d] + full[d] - 1) / full[d];
  }
  c.thread_index = i;
  c.lane = i % kSimdWidth;
  c.simdgroup = i / kSimdWidth;
  c.simdgroups = static_cast<uint32_t>(simdgroups.size());
  c.lanes = simdgroups[c.simdgroup].count;
  lane.stack_pointer = stacks.start(i, lane_main);
}

void Executor::prepare(const uint32_t at[3], const uint32_t grid[3], const uint32_t full[3]) {
  uint32_t size[3];
  for (int d = 0; d < 3; d++)
    size[d] = std::min(full[d], grid[d] - at[d] * full[d]);
  count = size[0] * size[1] * size[2];
  done = at_barrier = 0;
  arena_used = arena_counted = 0;
  variables.clear();
  lanes.resize(count);
  simdgroups.resize((count + kSimdWidth - 1) / kSimdWidth);
  for (uint32_t i = 0; i < simdgroups.size(); i++) {
    Simdgroup& s = simdgroups[i];
    s.first = i * kSimdWidth;
    s.count = std::min(kSimdWidth, count - s.first);
    s.arrived = s.parity = 0;
  }
  for (uint32_t i = 0; i < count; i++)
    prepare_lane(i, at, size, grid, full);
}

// Simdgroups stay together in the shuffled order (lanes shuffled inside): mixed lanes would only
// add switches.
void Executor::schedule() {
  order.resize(count);
  position.resize(count);
  std::iota(order.begin(), order.end(), 0u);
  if (dispatch->order == MSL_REVERSE)
    std::reverse(order.begin(), order.end());
  if (dispatch->order == MSL_SHUFFLED) {
    std::vector<uint32_t> groups(simdgroups.size());
    std::iota(groups.begin(), groups.end(), 0u);
    shuffler.shuffle(groups.data(), static_cast<uint32_t>(groups.size()));
    uint32_t at = 0;
    for (uint32_t g : groups) {
      std::iota(order.begin() + at, order.begin() + at + simdgroups[g].count, simdgroups[g].first);
      shuffler.shuffle(order.data() + at, simdgroups[g].count);
      at += simdgroups[g].count;
    }
  }
  for (uint32_t i = 0; i < count; i++)
    position[order[i]] = i;
}

void Executor::run_threadgroup(const uint32_t at[3], const uint32_t grid[3],
                               const uint32_t full[3]) {
  static const char keys[kThreadgroupArguments] = {};
  prepare(at, grid, full);
  schedule();
  if constexpr (kChecks)
    checker::begin_threadgroup();
  for (uint32_t i = 0; i < kThreadgroupArguments; i++) {
    arguments[i] = nullptr;
    if (i >= dispatch->threadgroup_bytes_count || dispatch->threadgroup_bytes[i] == 0)
      continue;
    const std::string name = "threadgroup(" + std::to_string(i) + ")";
    arguments[i] = allocate(&keys[i], dispatch->threadgroup_bytes[i], 16, name.c_str());
  }
  in_fibers = true;
  switch_from(&main_stack, order[0]);
  in_fibers = false;
}

} // namespace msl

using msl::executor;

extern "C" {

char* msl_slots() {
  msl::Simdgroup& s = executor->simdgroups[msl_self->simdgroup];
  return s.slots[s.parity];
}

bool msl_meet(const msl_site& site) {
  msl::Lane& lane = executor->lanes[executor->current];
  msl::Simdgroup& s = executor->simdgroups[lane.context.simdgroup];
  lane.state = msl::State::kInSimdgroup;
  lane.site = site;
  if (s.arrived == 0) {
    s.site = site;
  } else if (!msl::same(s.site, site)) {
    msl::diverged();
  }
  if (++s.arrived == s.count)
    return true;
  msl::reschedule();
  return false;
}

void msl_release() {
  msl::Simdgroup& s = executor->simdgroups[msl_self->simdgroup];
  s.arrived = 0;
  s.parity ^= 1;
  for (uint32_t i = s.first; i < s.first + s.count; i++)
    executor->lanes[i].state = msl::State::kRuns;
}

void msl_simdgroup_barrier(int flags, const msl_site& site) {
  if (!msl_meet(site))
    return;
  if constexpr (msl::kChecks)
    msl::checker::simdgroup_barrier(msl_self->simdgroup, flags);
  msl_release();
}

void msl_threadgroup_barrier(int flags, const msl_site& site) {
  msl::Executor& e = *executor;
  msl::Lane& lane = e.lanes[e.current];
  lane.state = msl::State::kAtBarrier;
  lane.site = site;
  e.barriers++;
  if (e.at_barrier == 0) {
    e.barrier_site = site;
  } else if (!msl::same(e.barrier_site, site)) {
    msl::diverged();
  }
  if (++e.at_barrier < e.count)
    return msl::reschedule();
  e.at_barrier = 0;
  if constexpr (msl::kChecks)
    msl::checker::threadgroup_barrier(flags);
  for (msl::Lane& other : e.lanes)
    other.state = msl::State::kRuns;
}

void* msl_threadgroup_variable(const void* key, msl_u64 size, msl_u64 align, const char* name) {
  return executor->allocate(key, size, align, name);
}

void* msl_bound_buffer(msl_u32 index) { return executor->buffers[index]; }
void* msl_bound_threadgroup(msl_u32 index) { return executor->arguments[index]; }

void msl_fail(const char* message, const msl_site& site) {
  msl::fail(std::string(message) + " in " + msl::where(site) + " by " + msl::who());
}

void msl_atomic_access(const volatile void* p, msl_u64 size, bool write, const msl_site& site) {
  if constexpr (msl::kChecks)
    msl::checker::atomic_access(p, size, write, site);
}

} // extern "C"
