#include "queue.h"
#include "export.h"
#include "memory.h"

#include <deque>
#include <stdexcept>

namespace standin {
namespace {

std::deque<std::function<void()>> waiting;
bool is_lazy = false;
int64_t queued = 0, waits = 0;

void run_until(int64_t number) {
  while (!waiting.empty() && queued - int64_t(waiting.size()) < number) {
    const auto work = std::move(waiting.front());
    waiting.pop_front();
    work();
  }
  if (waiting.empty())
    free_released();
}

} // namespace

void enqueue(std::function<void()> work) {
  ++queued;
  if (!is_lazy)
    return work();
  waiting.push_back(std::move(work));
}

void wait_for_all() {
  waits += is_lazy;
  run_until(queued);
}

bool is_busy() { return !waiting.empty(); }

} // namespace standin

// Whether work is done as late as possible from now on; what waits is done first.
STANDIN_EXPORT void standin_set_lazy(int64_t lazy) {
  standin::run_until(standin::queued);
  standin::is_lazy = lazy != 0;
}

STANDIN_EXPORT void standin_wait_for_all() { standin::wait_for_all(); }

// How often the host waited for all work, while work is done late.
STANDIN_EXPORT int64_t standin_waits() { return standin::waits; }

// An event is the number of what was queued before it. Its signal is not committed by itself.
STANDIN_EXPORT int64_t standin_record_event() { return standin::queued; }

// 0 if nobody has committed the event's signal: on a Mac this would wait for ever.
STANDIN_EXPORT int64_t standin_wait_for_event(int64_t event) {
  if (event == standin::queued && standin::is_lazy)
    return 0;
  standin::run_until(event);
  return 1;
}
