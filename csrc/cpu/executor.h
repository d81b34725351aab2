// Runs a decode plan on the CPU: one parallel region a token, nothing allocated, no Python inside.
#pragma once

#include <memory>
#include <vector>

#include "prefill.h"
#include "threads.h"
#include "token_inputs.h"

namespace q4metal::cpu {

struct Workspace;

class Executor {
public:
  // `context`: the largest position + 1. Throws std::bad_alloc.
  Executor(plan::Plan plan, int64_t context);
  ~Executor();

  const plan::Plan& plan() const { return plan_; }
  int64_t context() const { return context_; }
  int64_t workspace_bytes() const;

  // Callers take turns. `threads` of them compute; results do not depend on how many. More than
  // plan::kMaxRows rows are a chunk of one text's prompt (prefill.h). False, and nothing was
  // computed, after `close`. For `interrupted` see prefill.h.
  bool run(const TokenInputs& inputs, int threads, void (*interrupted)() = nullptr);

  // Ends the executor's use of the weights: returns when the pass under way has ended.
  void close();

private:
  plan::Plan plan_;
  int64_t context_;
  ForkSafeLock turn_;
  bool closed_ = false;
  Prefill prefill_;
  std::unique_ptr<Workspace> workspace_;
};

} // namespace q4metal::cpu
