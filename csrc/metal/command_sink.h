// What the decode plan asks of a GPU: commands of one pass, in order. sink.mm gives them to Metal;
// the tests run them on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace q4metal::mps {

// A place in a Metal buffer. `buffer` is the id<MTLBuffer>: what an MPS storage calls its data.
struct Memory {
  const void* buffer = nullptr;
  uint64_t offset = 0;

  Memory at(uint64_t bytes) const { return {buffer, offset + bytes}; }
};

// Dispatches may run at the same time, and in any order, until a barrier.
class CommandSink {
public:
  virtual ~CommandSink() = default;
  virtual void pipeline(const void* state) = 0; // an id<MTLComputePipelineState>
  virtual void buffer(unsigned index, Memory memory) = 0;
  virtual void bytes(unsigned index, const void* data, size_t size) = 0; // at most 4096
  // Memory that a kernel reaches through an address in another buffer.
  virtual void resident(Memory memory, bool written) = 0;
  virtual void dispatch(const Launch& launch) = 0;
  virtual void barrier() = 0;
};

} // namespace q4metal::mps
