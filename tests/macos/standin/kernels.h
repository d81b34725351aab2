// Kernels of the stand-in: Metal text compiled by tests/msl, run on the host.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../../msl/runtime/library.h"
#include "memory.h"

namespace standin {

// What a pipeline state is to Metal.
struct Pipeline {
  std::shared_ptr<msl::Library> library;
  std::string name;
};

// Compiles Metal text through the function that the test set. Throws std::runtime_error with what
// the compiler says.
std::shared_ptr<msl::Library> compile(const std::string& text);

// What is bound to an index: memory of a tensor, or the bytes of setBytes.
struct Argument {
  Range memory{nullptr, 0};
  std::vector<std::byte> bytes;
  bool bound = false;
};

// Runs a kernel over a grid counted in threads and notes it. Throws std::runtime_error with what
// the executor found.
void run(const Pipeline& pipeline, std::vector<Argument>& arguments, const uint64_t threads[3],
         const uint64_t group[3]);

} // namespace standin
