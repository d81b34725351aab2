// Addresses of MPS memory for plans. A plan's segments hold plain addresses that it never follows;
// an address in a Metal buffer is the number of the buffer and an offset in it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "command_sink.h"

namespace q4metal::mps {

class DeviceMemory {
public:
  // The address of a place `offset` bytes into `buffer`.
  uintptr_t address(const void* buffer, uint64_t offset) {
    if (offset >> kOffsetBits != 0)
      throw std::invalid_argument("an offset of " + std::to_string(offset) +
                                  " bytes lies beyond any Metal buffer");
    size_t number = 0;
    while (number < buffers_.size() && buffers_[number] != buffer)
      ++number;
    if (number == buffers_.size())
      buffers_.push_back(buffer);
    return uintptr_t(number + 1) << kOffsetBits | offset;
  }

  // Nothing where the address is null.
  Memory at(const void* address) const {
    const auto value = reinterpret_cast<uintptr_t>(address);
    if (value == 0)
      return {};
    return {buffers_.at((value >> kOffsetBits) - 1), value & ((uintptr_t(1) << kOffsetBits) - 1)};
  }

private:
  static constexpr int kOffsetBits = 40; // a terabyte: no Metal buffer is that large

  std::vector<const void*> buffers_;
};

} // namespace q4metal::mps
