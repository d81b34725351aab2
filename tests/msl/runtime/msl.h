// C interface of a compiled .metal library: load the shared object that tests/msl built with
// dlopen, look these names up with dlsym, dispatch kernels on memory of the process. Plain C, no
// dependencies.
#pragma once
#include <stdint.h>

#include "parameter.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MSL_ABI = 1 };

enum msl_buffer_flags {
  MSL_READ_ONLY = 1, // a write is an error whatever the kernel declares
  MSL_UNWRITTEN =
      2, // the content means nothing yet: reading it before it is written is an error (check build)
};

enum msl_order {
  MSL_FORWARD = 0,
  MSL_REVERSE = 1,
  MSL_SHUFFLED = 2
}; // of threads and threadgroups

// `size` counts bytes from `data` to the end of what the kernel may touch. data == NULL: not bound.
typedef struct msl_buffer {
  void* data;
  uint64_t size;
  uint32_t flags;
  uint32_t reserved;
} msl_buffer;

// A value for `[[function_constant(index)]]`; `size` is that of its type (bool is 1 byte).
typedef struct msl_constant {
  uint32_t index;
  uint32_t size;
  const void* value;
} msl_constant;

typedef struct msl_dispatch {
  const char* kernel;  // host name
  uint32_t threads[3]; // of the whole grid, as dispatchThreads counts them: the last threadgroup
                       // of a direction is smaller where the size does not divide the grid
  uint32_t threads_per_threadgroup[3];
  const msl_buffer* buffers; // by [[buffer(n)]]; setBytes is a buffer too
  uint32_t buffer_count;
  uint32_t resident_count;
  const msl_buffer* resident; // memory reached through pointers that a buffer holds (useResource)
  const msl_constant* constants;
  uint32_t constant_count;
  uint32_t threadgroup_bytes_count;
  const uint32_t* threadgroup_bytes; // by [[threadgroup(n)]]: setThreadgroupMemoryLength
  uint32_t order;                    // msl_order
  uint32_t seed;                     // of the shuffled order
  // Results.
  uint64_t switches;           // between threads
  uint64_t barriers;           // arrivals of threads at threadgroup barriers
  uint64_t threadgroup_memory; // bytes a threadgroup used
  char error[1024];            // one line; empty after success
} msl_dispatch;

typedef struct msl_range { // bytes [begin, end) of a buffer
  uint64_t begin, end;
} msl_range;

// All of these are exported by the shared object. One dispatch runs at a time (the others wait).
int msl_abi(void);    // MSL_ABI
int msl_checks(void); // 1: check build, 0: typed build
uint32_t msl_kernel_count(void);
const char* msl_kernel_name(uint32_t kernel);
int msl_kernel_find(const char* name);            // its number, or -1
uint32_t msl_kernel_max_threads(uint32_t kernel); // of a threadgroup, whatever the device
uint32_t msl_parameter_count(uint32_t kernel);    // buffers only
const msl_parameter* msl_parameter_get(uint32_t kernel, uint32_t i);
int msl_constant_find(const char* name); // n of its function_constant(n), or -1

// Runs the kernel to its end. Returns 0, or 1 with dispatch->error set.
int msl_run(msl_dispatch* dispatch);

// What the last successful msl_run of a check build touched: ascending, disjoint byte ranges of
// buffer `n` (numbers from `buffer_count` on are the resident ones). Returns how many there are;
// writes at most `capacity`.
uint32_t msl_touched(uint32_t n, int written, msl_range* out, uint32_t capacity);

#ifdef __cplusplus
}
#endif
