// The ends of the decode plan: residual rows from and to another stage, and the choice of a token.
#include <metal_stdlib>

#include "plan_launch.h"

using namespace metal;
using namespace q4metal::mps;

kernel void plan_copy(device const float* from [[buffer(0)]], device float* to [[buffer(1)]],
                      constant CopyArgs& args [[buffer(2)]], uint at [[thread_position_in_grid]]) {
  if (at < args.count)
    to[at] = from[at];
}

// tokens [R] = the first of the largest logits [R, V]; one threadgroup a row.
kernel void plan_argmax(device const float* logits [[buffer(0)]], device long* tokens [[buffer(1)]],
                        constant ArgmaxArgs& args [[buffer(2)]],
                        uint row [[threadgroup_position_in_grid]],
                        uint thread_at [[thread_index_in_threadgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float tops[kArgmaxThreads / kSimdWidth];
  threadgroup uint firsts[kArgmaxThreads / kSimdWidth];
  device const float* values = logits + ulong(args.vocab_size) * row;
  float top = -INFINITY;
  uint first = args.vocab_size; // none yet
  for (uint i = thread_at; i < args.vocab_size; i += kArgmaxThreads)
    if (values[i] > top || first == args.vocab_size) {
      top = values[i];
      first = i;
    }
  float best = simd_max(top);
  uint at = simd_min(top == best ? first : args.vocab_size);
  if (lane == 0) {
    tops[simdgroup] = best;
    firsts[simdgroup] = at;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0)
    return;
  best = simd_max(tops[lane]);
  at = simd_min(tops[lane] == best ? firsts[lane] : args.vocab_size);
  if (lane == 0)
    tokens[row] = long(at);
}
