// Runs a decode plan on the CPU: one parallel region a token, nothing allocated, no Python inside.
#pragma once

#include <memory>
#include <vector>

#include "../plan/plan.h"
#include "threads.h"

namespace q4metal::cpu {

// Keys and values of `blocks` KV blocks: [2, layers, blocks, kv_heads, 32, head_dim].
struct KvSlab {
  std::byte* data;
  int64_t blocks;
};

// One pass: `rows` tokens, each with its own position and block table. Rows of one sequence come in
// the order of their positions.
struct TokenInputs {
  int64_t rows;
  const int64_t* ids;          // [rows], if the plan embeds
  const float* hidden;         // [rows, hidden_size], if it does not
  const int64_t* positions;    // [rows]
  const float* rope;           // [rows, 2, head_dim]: cos, sin
  const int32_t* block_tables; // [rows, table_stride]: row of the slab + slab_blocks * slab
  int64_t table_stride;
  const KvSlab* slabs;
  int64_t slab_blocks; // rows of every slab but the last
  float* out;          // logits [rows, vocab_size], or without a head residual rows like `hidden`
  int64_t* tokens;     // [rows], argmax; or null
};

class Executor {
public:
  // `context`: the largest position + 1. Throws std::bad_alloc.
  Executor(plan::Plan plan, int64_t context);
  ~Executor();

  const plan::Plan& plan() const { return plan_; }
  int64_t context() const { return context_; }
  int64_t workspace_bytes() const;

  // Callers take turns. `threads` of them compute; results do not depend on how many. False, and
  // nothing was computed, after `close`.
  bool run(const TokenInputs& inputs, int threads);

  // Ends the executor's use of the weights: returns when the pass under way has ended.
  void close();

private:
  struct Workspace;

  plan::Plan plan_;
  int64_t context_;
  ForkSafeLock turn_;
  bool closed_ = false;
  std::unique_ptr<Workspace> workspace_;
};

} // namespace q4metal::cpu
