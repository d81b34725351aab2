// The steps of a pass of few rows, as one of its threads runs them.
#pragma once

#include "executor_workspace.h"
#include "threads.h"
#include "token_inputs.h"

namespace q4metal::cpu {

// The part of thread `thread` in a pass of `threads`, which all run at the same time. The workspace
// has started for so many.
void run_pass(const plan::Plan& plan, Workspace& workspace, const TokenInputs& inputs,
              Barrier& barrier, int thread, int threads);

} // namespace q4metal::cpu
