#include "executor.h"

#include <mutex>

#include "executor_pass.h"
#include "executor_workspace.h"

namespace q4metal::cpu {

Executor::Executor(plan::Plan plan, int64_t context)
    : plan_(std::move(plan)), context_(context), prefill_(plan_),
      workspace_(std::make_unique<Workspace>(plan_, context)) {}

Executor::~Executor() = default;

int64_t Executor::workspace_bytes() const {
  return workspace_->bytes() + prefill_.workspace_bytes();
}

void Executor::close() {
  std::lock_guard<ForkSafeLock> turn(turn_);
  closed_ = true;
}

bool Executor::run(const TokenInputs& inputs, int threads, void (*interrupted)()) {
  std::lock_guard<ForkSafeLock> turn(turn_);
  if (closed_)
    return false;
  if (inputs.rows > plan::kMaxRows) {
    prefill_.run(inputs, threads, interrupted);
    return true;
  }
  workspace_->start(threads, inputs.out == nullptr ? inputs.rows : 0);
  struct Region {
    const plan::Plan& plan;
    Workspace& workspace;
    const TokenInputs& inputs;
    int threads;
    Barrier barrier;
  } region{plan_, *workspace_, inputs, threads, Barrier(threads)};
  run_together(
      threads,
      [](void* context, int thread) {
        auto& r = *static_cast<Region*>(context);
        run_pass(r.plan, r.workspace, r.inputs, r.barrier, thread, r.threads);
      },
      &region);
  return true;
}

} // namespace q4metal::cpu
