// The best of a row's candidates, over a threadgroup of kTokenThreads.
#pragma once

#include "plan_launch.h"

using namespace q4metal::mps;

struct Candidate {
  float value;
  uint index;
};

inline Candidate nobody() { return Candidate{-INFINITY, 0xffffffffu}; }

// Of equal values the one with the smaller index stays.
inline void consider(float value, uint index, thread Candidate& best) {
  if (value > best.value || (value == best.value && index < best.index)) {
    best.value = value;
    best.index = index;
  }
}

inline Candidate best_of_simdgroup(Candidate own) {
  Candidate best;
  best.value = simd_max(own.value);
  best.index = simd_min(own.value == best.value ? own.index : 0xffffffffu);
  return best;
}

// The same in all threads; `values` and `indices` have room for one a simdgroup.
inline Candidate best_of(Candidate own, threadgroup float* values, threadgroup uint* indices,
                         uint simdgroup, uint lane) {
  Candidate best = best_of_simdgroup(own);
  if (lane == 0) {
    values[simdgroup] = best.value;
    indices[simdgroup] = best.index;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  own.value = values[lane];
  own.index = indices[lane];
  return best_of_simdgroup(own);
}

// Kernels with that many threads say so in their declaration: without it the compiler may give each
// so many registers that a threadgroup has room for half of them, and Metal drops the dispatch.
static_assert(kTokenThreads == kSimdWidth * kSimdWidth, "one lane for each simdgroup");
