// Memory of the passes of few rows, allocated before the first of its kind.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "../plan/plan.h"
#include "aligned_memory.h"
#include "executor_shares.h"
#include "likeliest.h"

namespace q4metal::cpu {

// Positions that one thread attends to at a time. Cut by context length only, so that the order of
// addition does not depend on threads or rows.
constexpr int64_t kSplit = 512;

constexpr int64_t splits_of(int64_t positions) { return (positions + kSplit - 1) / kSplit; }

struct Workspace {
  // `context`: the largest position + 1. Throws std::bad_alloc.
  Workspace(const plan::Plan& plan, int64_t context);

  // Before a pass: scratch for so many threads, logits of so many rows, and nothing taken of any
  // step.
  void start(int threads_of_pass, int64_t logits_rows);

  int64_t bytes() const;

  // By row, at most plan::kMaxRows of each.
  float *hidden, *queries, *activation;
  float* partial;            // attention's, a split each: [splits, heads, head_dim + 2]
  int64_t partial_stride;    // floats of one row's
  float *rows_out, *rows_up; // outputs of a matrix before they are used, by their own threads
  float* logits = nullptr;   // where only the likeliest tokens are wanted

  // Scratch of one thread: the step's input, normalised and prepared for its matrices.
  struct Thread {
    AlignedMemory memory;
    float* input;
    std::array<std::byte*, 3> prepared;
    std::array<Likeliest, plan::kMaxRows> likeliest; // of what it computed, by row
  };
  std::vector<std::unique_ptr<Thread>> threads;

  Shares shares;

private:
  AlignedMemory shared_, logits_;
  int steps_;
  int64_t vocab_size_;
  size_t input_floats_ = 0, prepared_bytes_ = 0; // of a thread
};

} // namespace q4metal::cpu
