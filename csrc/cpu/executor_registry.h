// Executors by integer handle: torch operators take integers, not C++ objects. A handle is never
// used twice, and whoever looks one up holds the executor while it runs.
#pragma once

#include <cstdint>
#include <memory>

#include "executor.h"

namespace q4metal::cpu {

int64_t add_executor(std::shared_ptr<Executor> executor);
std::shared_ptr<Executor> find_executor(int64_t handle); // null if it was removed, or never was
// Returns when the pass under way has ended: then the weights may be freed.
void remove_executor(int64_t handle);

} // namespace q4metal::cpu
