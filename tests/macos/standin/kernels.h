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

// A kernel with all that is bound to it, over a grid counted in threads.
struct Call {
  Pipeline pipeline;
  std::vector<Argument> arguments;
  std::vector<Range> resident; // memory that it reaches through addresses in its arguments
  uint64_t threads[3];
  uint64_t group[3];
  // Whether its outputs were just made, so that what they hold means nothing.
  bool has_fresh_outputs;
};

// Bytes of host memory that a call has read, or written.
struct Access {
  const std::byte *begin, *end;
  bool written;
};

// Runs the call and notes it. The check build gives every byte that was touched; the typed build
// one byte for each binding, its first. Throws std::runtime_error with what the executor found.
std::vector<Access> run(Call& call);

} // namespace standin
