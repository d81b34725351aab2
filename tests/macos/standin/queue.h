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
// From now on work is done as late as possible, or at once; what waits is done first.
void set_lazy(bool lazy);
// How often somebody waited for all work, while work was done late.
int64_t waits();
// An event is the number of what was queued before it. Its signal is not committed by itself: false
// if nobody did, for on a Mac that would wait for ever.
int64_t record_event();
bool wait_for_event(int64_t event);
// Whether work waits to be done. What it reads and writes must stay then.
bool is_busy();

} // namespace standin
