#include "queue.h"
#include "memory.h"

#include <c10/core/InferenceMode.h>

#include <deque>
#include <utility>

namespace standin {
namespace {

std::deque<std::function<void()>> waiting;
bool is_lazy = false;
int64_t queued = 0, waited = 0;

void run_until(int64_t number) {
  const c10::InferenceMode guard; // the device does not care how tensors came to be
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
  waited += is_lazy;
  run_until(queued);
}

bool is_busy() { return !waiting.empty(); }

void set_lazy(bool lazy) {
  run_until(queued);
  is_lazy = lazy;
}

int64_t waits() { return waited; }

int64_t record_event() { return queued; }

bool wait_for_event(int64_t event) {
  if (event == queued && is_lazy)
    return false;
  run_until(event);
  return true;
}

} // namespace standin
