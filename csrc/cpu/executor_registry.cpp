#include "executor_registry.h"

#include <mutex>
#include <unordered_map>

namespace q4metal::cpu {
namespace {

ForkSafeLock mutex;
int64_t last_handle = 0;

std::unordered_map<int64_t, std::shared_ptr<Executor>>& executors() {
  static auto* map = new std::unordered_map<int64_t, std::shared_ptr<Executor>>; // outlives Python
  return *map;
}

} // namespace

int64_t add_executor(std::shared_ptr<Executor> executor) {
  std::lock_guard<ForkSafeLock> lock(mutex);
  executors()[++last_handle] = std::move(executor);
  return last_handle;
}

std::shared_ptr<Executor> find_executor(int64_t handle) {
  std::lock_guard<ForkSafeLock> lock(mutex);
  const auto found = executors().find(handle);
  return found == executors().end() ? nullptr : found->second;
}

void remove_executor(int64_t handle) {
  std::shared_ptr<Executor> executor;
  {
    std::lock_guard<ForkSafeLock> lock(mutex);
    const auto found = executors().find(handle);
    if (found == executors().end())
      return;
    executor = std::move(found->second);
    executors().erase(found);
  }
  executor->close();
}

} // namespace q4metal::cpu
