// The C interface: tables of the library, and one dispatch from its arguments to its results.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "checker.h"
#include "executor.h"
#include "faults.h"

namespace msl {

namespace {

std::mutex one_at_a_time;

uint32_t safe_threads(const msl_kernel_entry& kernel) {
  return kernel.max_threads == 0 ? kSafeThreads : kernel.max_threads;
}

std::string check_sizes(const msl_dispatch& d, const msl_kernel_entry& kernel) {
  uint64_t threads = 1;
  for (int i = 0; i < 3; i++) {
    if (d.threads[i] == 0)
      return "a grid of 0 threads";
    if (d.threads_per_threadgroup[i] == 0)
      return "a threadgroup of 0 threads";
    threads *= d.threads_per_threadgroup[i];
  }
  if (threads > kMaxThreads)
    return "a threadgroup of " + std::to_string(threads) + " threads; at most 1024 are possible";
  if (threads > safe_threads(kernel))
    return "a threadgroup of " + std::to_string(threads) +
           " threads; Metal may drop it unless max_total_threads_per_threadgroup says so";
  if (d.threadgroup_bytes_count > kThreadgroupArguments)
    return "more than 8 threadgroup arguments";
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < d.threadgroup_bytes_count; i++) {
    if (d.threadgroup_bytes[i] % 16)
      return "threadgroup(" + std::to_string(i) + ") of " + std::to_string(d.threadgroup_bytes[i]) +
             " bytes; Metal wants a multiple of 16";
    bytes += d.threadgroup_bytes[i];
  }
  if (bytes > kThreadgroupLimit)
    return "threadgroup arguments of " + std::to_string(bytes) + " bytes, the limit is 32768";
  return "";
}

std::string check_buffers(const msl_dispatch& d, const msl_kernel_entry& kernel) {
  for (uint32_t i = 0; i < kernel.parameter_count; i++) {
    const msl_parameter& p = kernel.parameters[i];
    const std::string name = "buffer(" + std::to_string(p.index) + ") '" + p.name + "'";
    const bool bound = p.index < d.buffer_count && d.buffers[p.index].data;
    if (!bound && !p.optional)
      return name + " is not bound";
    if (bound && d.buffers[p.index].size < p.size)
      return name + " has " + std::to_string(d.buffers[p.index].size) + " bytes, its type needs " +
             std::to_string(p.size);
  }
  for (uint32_t n = 0; n < d.buffer_count; n++) {
    if (!d.buffers[n].data)
      continue;
    const msl_parameter* end = kernel.parameters + kernel.parameter_count;
    if (std::find_if(kernel.parameters, end, [&](auto& p) { return p.index == n; }) == end)
      return "buffer(" + std::to_string(n) + ") is bound, the kernel has no such parameter";
  }
  return "";
}

std::string set_constants(const msl_dispatch& d, const msl_kernel_entry& kernel) {
  for (uint32_t i = 0; i < msl_constants_count; i++)
    *msl_constants[i].defined = false;
  for (uint32_t k = 0; k < d.constant_count; k++) {
    const msl_constant& value = d.constants[k];
    const std::string name = "function constant " + std::to_string(value.index);
    bool known = false;
    for (uint32_t i = 0; i < msl_constants_count; i++) {
      const msl_constant_entry& c = msl_constants[i];
      if (c.index != value.index)
        continue;
      if (c.size != value.size)
        return name + " '" + c.name + "' has " + std::to_string(c.size) + " bytes, got " +
               std::to_string(value.size);
      memcpy(c.value, value.value, c.size);
      *c.defined = known = true;
    }
    if (!known)
      return name + " does not exist in the library";
  }
  for (uint32_t i = 0; i < msl_constants_count; i++)
    if (!*msl_constants[i].defined)
      memset(msl_constants[i].value, 0, msl_constants[i].size);
  for (uint32_t k = 0; k < kernel.constant_count; k++) {
    const msl_constant_entry& c = msl_constants[kernel.constants[k]];
    if (c.required && !*c.defined)
      return "function constant " + std::to_string(c.index) + " '" + c.name + "' is not set";
  }
  msl_derive_constants();
  return "";
}

// Threadgroups in the order that the dispatch asks for.
void run_grid(Executor& e, const msl_dispatch& d) {
  uint32_t groups[3];
  for (int i = 0; i < 3; i++)
    groups[i] = (d.threads[i] + d.threads_per_threadgroup[i] - 1) / d.threads_per_threadgroup[i];
  const uint32_t total = groups[0] * groups[1] * groups[2];
  std::vector<uint32_t> shuffled;
  if (d.order == MSL_SHUFFLED) {
    shuffled.resize(total);
    for (uint32_t i = 0; i < total; i++)
      shuffled[i] = i;
    shuffler = Random(d.seed);
    shuffler.shuffle(shuffled.data(), total);
  }
  for (uint32_t i = 0; i < total && e.error.empty(); i++) {
    const uint32_t n = d.order == MSL_SHUFFLED  ? shuffled[i]
                       : d.order == MSL_REVERSE ? total - 1 - i
                                                : i;
    const uint32_t at[3] = {n % groups[0], n / groups[0] % groups[1], n / groups[0] / groups[1]};
    e.run_threadgroup(at, d.threads, d.threads_per_threadgroup);
  }
}

std::string run(msl_dispatch& d) {
  const int number = msl_kernel_find(d.kernel);
  if (number < 0)
    return "no kernel of this name";
  const msl_kernel_entry& kernel = msl_kernels[number];
  for (std::string error :
       {check_sizes(d, kernel), check_buffers(d, kernel), set_constants(d, kernel)})
    if (!error.empty())
      return error;
  if (!executor)
    executor = new Executor; // kept: its stacks are reused by every dispatch
  Executor& e = *executor;
  e.dispatch = &d;
  e.kernel = &kernel;
  e.error.clear();
  e.switches = e.barriers = e.most_threadgroup_memory = 0;
  e.stacks.reserve(d.threads_per_threadgroup[0] * d.threads_per_threadgroup[1] *
                   d.threads_per_threadgroup[2]);
  if (!e.stacks.count())
    return "no memory for the threads' stacks";
  e.buffers.assign(std::max(d.buffer_count, 32u), nullptr);
  for (uint32_t i = 0; i < d.buffer_count; i++)
    e.buffers[i] = d.buffers[i].data;
  if constexpr (kChecks)
    checker::begin(d, kernel, e);
  {
    FaultGuard guard;
    run_grid(e, d);
  }
  if constexpr (kChecks)
    checker::end(d, e.error.empty());
  d.switches = e.switches;
  d.barriers = e.barriers;
  d.threadgroup_memory = e.most_threadgroup_memory;
  return e.error;
}

} // namespace

} // namespace msl

#define MSL_EXPORT extern "C" __attribute__((visibility("default")))

MSL_EXPORT int msl_abi(void) { return MSL_ABI; }
MSL_EXPORT int msl_checks(void) { return msl::kChecks; }
MSL_EXPORT uint32_t msl_kernel_count(void) { return msl_kernels_count; }
MSL_EXPORT const char* msl_kernel_name(uint32_t kernel) { return msl_kernels[kernel].name; }

MSL_EXPORT int msl_kernel_find(const char* name) {
  for (uint32_t i = 0; i < msl_kernels_count; i++)
    if (!strcmp(msl_kernels[i].name, name))
      return static_cast<int>(i);
  return -1;
}

MSL_EXPORT uint32_t msl_kernel_max_threads(uint32_t kernel) {
  return msl::safe_threads(msl_kernels[kernel]);
}

MSL_EXPORT uint32_t msl_parameter_count(uint32_t kernel) {
  return msl_kernels[kernel].parameter_count;
}
MSL_EXPORT const msl_parameter* msl_parameter_get(uint32_t kernel, uint32_t i) {
  return &msl_kernels[kernel].parameters[i];
}

MSL_EXPORT int msl_constant_find(const char* name) {
  for (uint32_t i = 0; i < msl_constants_count; i++)
    if (!strcmp(msl_constants[i].name, name))
      return static_cast<int>(msl_constants[i].index);
  return -1;
}

MSL_EXPORT int msl_run(msl_dispatch* dispatch) {
  std::lock_guard<std::mutex> lock(msl::one_at_a_time);
  const std::string error = msl::run(*dispatch);
  snprintf(dispatch->error, sizeof dispatch->error, "%s%s%s", error.empty() ? "" : dispatch->kernel,
           error.empty() ? "" : ": ", error.c_str());
  return !error.empty();
}

MSL_EXPORT uint32_t msl_touched(uint32_t n, int written, msl_range* out, uint32_t capacity) {
  if constexpr (msl::kChecks)
    return msl::checker::touched(n, written != 0, out, capacity);
  return 0;
}
