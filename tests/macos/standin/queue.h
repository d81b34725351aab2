// The stand-in's command queue. Work is done when it is queued, as if the GPU were infinitely fast;
// or, once a test asks for that, as late as a GPU may: when somebody waits for it.
#pragma once

#include <cstdint>
#include <functional>

namespace standin {

// Queues work and commits it, as far as it was not committed yet.
void enqueue(std::function<void()> work);
// Waits for all work. What the host wants to see at once does so.
void wait_for_all();
// Whether work waits to be done. What it reads and writes must stay then.
bool is_busy();

} // namespace standin
