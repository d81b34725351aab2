// Memory of the stand-in's MPS device. As on a Mac, what a storage calls its data is a handle that
// the host must not read: here an address range without access, whose content lies elsewhere.
#pragma once

#include <ATen/core/TensorBase.h>

#include <cstddef>
#include <cstdint>

namespace standin {

struct Range {
  std::byte* data;
  uint64_t size; // from data to the end of the tensor, or of the buffer
};

at::Allocator* allocator();
// The bytes that the tensor covers, from its first element to its last.
Range bytes_of(const at::TensorBase& tensor);
// The buffer behind a handle, from `offset` on.
Range bytes_of(const void* handle, uint64_t offset);
int64_t allocations();
// Frees what was released while work that may use it was waiting.
void free_released();

} // namespace standin
