#include "executor_workspace.h"

#include <algorithm>

#include "kernels.h"

namespace q4metal::cpu {
namespace {

using plan::kMaxRows;
using plan::Segment;
using plan::Step;
using plan::StepKind;

int64_t widest_output(const plan::Plan& plan) {
  int64_t widest = 0;
  for (const Step& step : plan.steps)
    if (step.kind != StepKind::embed && step.kind != StepKind::norm_head)
      for (const Segment& segment : step.segments)
        widest = std::max(widest, segment.out_features());
  return widest;
}

} // namespace

Workspace::Workspace(const plan::Plan& plan, int64_t context)
    : steps_(int(plan.steps.size())), vocab_size_(plan.shape.vocab_size) {
  const auto& shape = plan.shape;
  const MatvecKernel& matvec = kernels().matvec(shape.precision);
  int64_t widest_input = 0;
  for (const Step& step : plan.steps)
    for (const Segment& segment : step.segments) {
      widest_input = std::max(widest_input, segment.in_features());
      if (const auto* packed = std::get_if<PackedMatrix>(&segment.matrix))
        for (int64_t rows = 1; rows <= kMaxRows; ++rows) // few rows may take another kernel
          prepared_bytes_ = std::max(prepared_bytes_, matvec.prepared_bytes(*packed, rows));
    }
  input_floats_ = kMaxRows * widest_input;
  partial_stride = splits_of(context) * shape.heads * (shape.head_dim + 2);
  const int64_t query = shape.heads * shape.head_dim, widest = widest_output(plan);
  shared_.allocate(
      sizeof(float) * kMaxRows *
          (shape.hidden_size + query + partial_stride + shape.intermediate_size + 2 * widest) +
      8 * kAlign);
  std::byte* at = shared_.data;
  hidden = take<float>(at, kMaxRows * shape.hidden_size);
  queries = take<float>(at, kMaxRows * query);
  partial = take<float>(at, kMaxRows * partial_stride);
  activation = take<float>(at, kMaxRows * shape.intermediate_size);
  rows_out = take<float>(at, kMaxRows * widest);
  rows_up = take<float>(at, kMaxRows * widest);
}

void Workspace::start(int threads_of_pass, int64_t logits_rows) {
  const size_t logits_bytes = logits_rows * vocab_size_ * sizeof(float);
  if (logits_.size < logits_bytes) {
    logits_.allocate(logits_bytes);
    logits = reinterpret_cast<float*>(logits_.data);
  }

  while (int(threads.size()) < threads_of_pass) {
    auto thread = std::make_unique<Thread>();
    thread->memory.allocate(input_floats_ * sizeof(float) + 3 * prepared_bytes_ + 8 * kAlign);
    std::byte* at = thread->memory.data;
    thread->input = take<float>(at, input_floats_);
    for (auto& prepared : thread->prepared)
      prepared = take<std::byte>(at, prepared_bytes_);
    threads.push_back(std::move(thread));
  }
  shares.start(steps_, threads_of_pass);
}

int64_t Workspace::bytes() const {
  int64_t total = int64_t(shared_.size + logits_.size);
  for (const auto& thread : threads)
    total += int64_t(thread->memory.size);
  return total;
}

} // namespace q4metal::cpu
