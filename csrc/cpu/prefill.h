// Runs a decode plan's steps for a chunk of a prompt: many rows of one text, matrices as GEMMs.
//
// Every phase of a layer needs all of the one before, so the phases follow each other as parallel
// loops on the thread team; what a thread computes beside a product (bias, RoPE, SwiGLU, the
// residual) it does while the product's columns are in its cache. Against a chain of torch
// operators that saves passes over the rows, and most of their memory: a chunk of 512 rows of a 7B
// model works in 50 MB.
#pragma once

#include <memory>

#include "../plan/plan.h"
#include "token_inputs.h"

namespace q4metal::cpu {

class Prefill {
public:
  explicit Prefill(const plan::Plan& plan); // which outlives it
  ~Prefill();

  // Rows at consecutive positions of one text. A row's results do not depend on how many rows or
  // threads there are, as long as there are more rows than a matvec takes. `interrupted`, if it is
  // not null, is called between layers and may throw. Throws std::bad_alloc.
  void run(const TokenInputs& inputs, int threads, void (*interrupted)());

  int64_t workspace_bytes() const;

private:
  struct Workspace;

  const plan::Plan& plan_;
  std::unique_ptr<Workspace> workspace_;
};

} // namespace q4metal::cpu
