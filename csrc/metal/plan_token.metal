// The ends of the decode plan: residual rows from and to another stage, and the choice of a token.
#include "plan_choice.h"

kernel void plan_copy(device const float* from [[buffer(0)]], device float* to [[buffer(1)]],
                      constant CopyArgs& args [[buffer(2)]], uint at [[thread_position_in_grid]]) {
  if (at < args.count)
    to[at] = from[at];
}

// tokens [R] = the first of the largest logits [R, V]; one threadgroup a row.
[[kernel, max_total_threads_per_threadgroup(kTokenThreads)]] void
plan_argmax(device const float* logits [[buffer(0)]], device long* tokens [[buffer(1)]],
            constant ArgmaxArgs& args [[buffer(2)]], uint row [[threadgroup_position_in_grid]],
            uint thread_at [[thread_index_in_threadgroup]],
            uint simdgroup [[simdgroup_index_in_threadgroup]],
            uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float values_of[kSimdWidth];
  threadgroup uint indices_of[kSimdWidth];
  device const float* values = logits + ulong(args.vocab_size) * row;
  Candidate best = nobody();
  for (uint i = thread_at; i < args.vocab_size; i += kTokenThreads)
    consider(values[i], i, best);
  best = best_of(best, values_of, indices_of, simdgroup, lane);
  if (thread_at == 0)
    tokens[row] = long(best.index);
}
