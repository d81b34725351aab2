// Compiled kernels: made when they are first needed, kept for the life of the process.
#pragma once

#include <ATen/native/mps/MetalShaderLibrary.h>

#include <memory>
#include <string>
#include <vector>

#include "launch.h"

namespace q4metal::mps {

using Function = at::native::mps::MetalKernelFunction;

// The compiled kernel, for one dispatch: a Function holds the encoder that it is used with, so
// each caller gets its own. Raises RuntimeError, with the kernel's name and what the Metal compiler
// says, where it does not compile.
std::shared_ptr<Function> pipeline(const KernelKey& key);

// The compiled kernels as id<MTLComputePipelineState>, in the order given; they are never freed.
// Kernels of one family are compiled together, each once. Errors as above.
std::vector<const void*> pipeline_states(const std::vector<Kernel>& kernels);

// What was compiled so far, in order.
struct Compiled {
  std::string kernels; // one, or several that were compiled together, separated by spaces
  double seconds;
};
std::vector<Compiled> compile_log();

} // namespace q4metal::mps
