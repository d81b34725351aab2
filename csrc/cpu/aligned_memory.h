// Memory whose parts begin on cache lines.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

namespace q4metal::cpu {

constexpr size_t kAlign = 64;

constexpr size_t aligned_size(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The next `count` elements of `next`, which moves on.
template <typename T> T* take(std::byte*& next, size_t count) {
  T* start = reinterpret_cast<T*>(next);
  next += aligned_size(count * sizeof(T));
  return start;
}

struct AlignedMemory {
  std::byte* data = nullptr;
  size_t size = 0;

  AlignedMemory() = default;
  AlignedMemory(const AlignedMemory&) = delete;
  ~AlignedMemory() { free(); }

  // Throws std::bad_alloc. Earlier contents are lost.
  void allocate(size_t bytes) {
    free();
    data = static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kAlign)));
    size = bytes;
  }

private:
  void free() {
    ::operator delete(data, std::align_val_t(kAlign));
    data = nullptr;
    size = 0;
  }
};

} // namespace q4metal::cpu
