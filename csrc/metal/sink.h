// A plan's commands on torch's current MPS stream.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "command_sink.h"

namespace q4metal::mps {

// Calls `encode` once with a sink whose commands run as one concurrent encoder behind everything
// that torch has queued, and hands them to the GPU without waiting. `encode` must not throw.
void submit(const std::function<void(CommandSink&)>& encode);

// What the GPU said of an earlier submission that failed; each failure is told once.
std::optional<std::string> take_failure();

} // namespace q4metal::mps
