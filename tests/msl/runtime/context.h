// What the text of a kernel and the executor say to each other. Included by both, so without any
// library header.
#pragma once

#include "parameter.h"

typedef unsigned int msl_u32;
typedef unsigned long msl_u64;

// Where in the .metal text an operation stands.
struct msl_site {
  const char* what;
  const char* file;
  int line;
};

// What a thread can ask about itself.
struct msl_context {
  msl_u32 thread_in_grid[3], thread_in_threadgroup[3], threadgroup_in_grid[3];
  msl_u32 threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3], threads_per_grid[3];
  msl_u32 threadgroups_per_grid[3];
  msl_u32 thread_index; // in the threadgroup
  msl_u32 lane;         // in the simdgroup
  msl_u32 simdgroup, simdgroups;
  msl_u32 lanes; // of this simdgroup: 32 except in the last one
};

struct msl_kernel_entry {
  const char* name;
  void (*run)(); // one thread, from the current context
  const msl_parameter* parameters;
  msl_u32 parameter_count;
  const msl_u32* constants; // numbers in msl_constants of those that it or what it calls mentions
  msl_u32 constant_count;
  msl_u32 max_threads; // of a threadgroup, as the text promises; 0: it promises nothing
};

struct msl_constant_entry {
  const char* name;
  msl_u32 index;
  void* value;
  msl_u32 size;
  bool* defined;
  bool required; // false where the text asks is_function_constant_defined
};

#define MSL_HIDDEN __attribute__((visibility("hidden")))

extern "C" {
// Written by the rewriter behind the text of the kernels.
MSL_HIDDEN extern const msl_kernel_entry msl_kernels[];
MSL_HIDDEN extern const msl_u32 msl_kernels_count;
MSL_HIDDEN extern const msl_constant_entry msl_constants[];
MSL_HIDDEN extern const msl_u32 msl_constants_count;
MSL_HIDDEN void msl_derive_constants(); // values that follow from function constants

// Given by the executor.
MSL_HIDDEN extern const msl_context* msl_self;

// Operations of a simdgroup: every lane writes its operands into msl_slots() (2 KiB that all lanes
// share), then meets. msl_meet returns true in the lane that goes on first; it may combine the
// operands, then must call msl_release().
MSL_HIDDEN char* msl_slots();
MSL_HIDDEN bool msl_meet(const msl_site& site);
MSL_HIDDEN void msl_release();

MSL_HIDDEN void msl_threadgroup_barrier(int flags, const msl_site& site);
MSL_HIDDEN void msl_simdgroup_barrier(int flags, const msl_site& site);
MSL_HIDDEN void* msl_threadgroup_variable(const void* key, msl_u64 size, msl_u64 align,
                                          const char* name);
MSL_HIDDEN void* msl_bound_buffer(msl_u32 index);
MSL_HIDDEN void* msl_bound_threadgroup(msl_u32 index);
MSL_HIDDEN void msl_atomic_access(const volatile void* p, msl_u64 size, bool write,
                                  const msl_site& site);
MSL_HIDDEN void msl_fail(const char* message, const msl_site& site);
}
