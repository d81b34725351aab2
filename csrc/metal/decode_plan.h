// Decode plans on MPS by integer handle, as cpu/executor_registry.h has those of the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "encoder.h"

namespace q4metal::mps {

// A plan with what its passes share. Passes of one plan are encoded one after another.
class DecodePlan {
public:
  // `memory` resolves the addresses of the plan's segments. Allocates the workspace.
  DecodePlan(plan::Plan plan, DeviceMemory memory, int64_t context);

  const Encoder& encoder() const { return encoder_; }
  const plan::Plan& plan() const { return encoder_.plan(); }
  int64_t context() const { return encoder_.context(); }
  int64_t workspace_bytes() const { return encoder_.workspace_bytes(); }
  // uint8 [workspace_bytes]: what steps hand on to each other.
  const at::Tensor& workspace() const { return workspace_; }
  // Room for logits [kMaxRows, vocabulary] where the caller wants token ids only; made once.
  at::Tensor logits(int64_t rows);
  // Compiles what is missing, then gives the commands to the GPU.
  void run(const Pass& pass);

private:
  std::mutex mutex_;
  Encoder encoder_;
  at::Tensor workspace_, logits_;
};

// Handles are never used twice, nor are they ever those of a plan on the CPU.
int64_t add_plan(std::shared_ptr<DecodePlan> plan);
std::shared_ptr<DecodePlan> find_plan(int64_t handle); // null if it was removed, or never was
void remove_plan(int64_t handle);

} // namespace q4metal::mps
