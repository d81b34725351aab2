// Kernels of the stand-in: Metal text compiled by tests/msl, run on the host.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../../msl/runtime/library.h"
#include "memory.h"

namespace standin {

// Metal text, compiled through the function that the test set: each build when it is first run.
class Program {
public:
  // Compiles what the mode asks for. Throws std::runtime_error with what the compiler says.
  explicit Program(std::string text) : text_(std::move(text)) { library(); }
  // The build of the mode that is set.
  const msl::Library& library();

private:
  std::string text_;
  std::unique_ptr<msl::Library> builds_[2]; // typed, check
};

// What a pipeline state is to Metal.
struct Pipeline {
  std::shared_ptr<Program> program;
  std::string name;
};

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

// Runs the call and notes it. The check build gives every byte of memory that was touched; the
// typed build one byte for each binding, its first. Throws std::runtime_error with what the
// executor found.
std::vector<Access> run(Call& call);

} // namespace standin
