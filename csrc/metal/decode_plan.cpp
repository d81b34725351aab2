#include "decode_plan.h"

#include <ATen/ops/empty.h>

#include <unordered_map>
#include <utility>

#include "pipelines.h"
#include "sink.h"

namespace q4metal::mps {
namespace {

constexpr int64_t kFirstHandle = int64_t(1) << 40; // the CPU counts from 1

struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<DecodePlan>> plans;
  int64_t next = kFirstHandle;

  static Registry& instance() {
    static auto* registry = new Registry;
    return *registry;
  }
};

} // namespace

DecodePlan::DecodePlan(plan::Plan plan, DeviceMemory memory, int64_t context)
    : encoder_(std::move(plan), std::move(memory), context, &pipeline_states),
      workspace_(
          at::empty({encoder_.workspace_bytes()}, at::TensorOptions(at::kMPS).dtype(at::kByte))) {}

at::Tensor DecodePlan::logits(int64_t rows) {
  const std::lock_guard lock(mutex_);
  if (!logits_.defined())
    logits_ = at::empty({plan::kMaxRows, plan().shape.vocab_size},
                        at::TensorOptions(at::kMPS).dtype(at::kFloat));
  return logits_.narrow(0, 0, rows);
}

void DecodePlan::run(const Pass& pass) {
  const std::lock_guard lock(mutex_);
  encoder_.prepare(pass); // may raise, which the block of `submit` must not
  const Memory workspace{workspace_.storage().data(), 0};
  submit([&](CommandSink& sink) { encoder_.encode(pass, workspace, sink); });
}

int64_t add_plan(std::shared_ptr<DecodePlan> plan) {
  auto& registry = Registry::instance();
  const std::lock_guard lock(registry.mutex);
  registry.plans[registry.next] = std::move(plan);
  return registry.next++;
}

std::shared_ptr<DecodePlan> find_plan(int64_t handle) {
  auto& registry = Registry::instance();
  const std::lock_guard lock(registry.mutex);
  const auto found = registry.plans.find(handle);
  return found == registry.plans.end() ? nullptr : found->second;
}

void remove_plan(int64_t handle) {
  auto& registry = Registry::instance();
  const std::lock_guard lock(registry.mutex);
  registry.plans.erase(handle);
}

} // namespace q4metal::mps
