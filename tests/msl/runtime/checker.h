// The check build's view of memory: bounds, races, reads of unwritten bytes, and what was touched.
#pragma once

#include "executor.h"

namespace msl::checker {

// Moves the buffers of the dispatch into memory of their own, with gaps between them, so that
// running over the end of one never lands in another; end() copies what was written back.
void begin(const msl_dispatch& dispatch, const msl_kernel_entry& kernel, Executor& e);
void end(const msl_dispatch& dispatch, bool ok);

void begin_threadgroup();
void add_threadgroup_variable(char* data, uint64_t size, const char* name);
void threadgroup_barrier(int flags);
void simdgroup_barrier(uint32_t simdgroup, int flags);

// Before each load and store; `pc` is an address in the instruction behind it.
void access(uint64_t address, uint64_t size, bool write, uint64_t pc);
void atomic_access(const volatile void* p, uint64_t size, bool write, const msl_site& site);

uint32_t touched(uint32_t buffer, bool written, msl_range* out, uint32_t capacity);

} // namespace msl::checker
