// Where the kernel's memory is, and what happened to every byte of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "msl.h"

namespace msl::checker {

// A thread at a point of its threadgroup's run. Barriers advance the epochs.
struct Moment {
  uint32_t threadgroup;
  uint16_t thread, group_epoch, simd_epoch;
};

// Last write and two reads of a byte. Two readers are enough to know that somebody else than a
// writer read it; the second is kept as far from the first as can be (another threadgroup, another
// simdgroup, another thread).
struct Byte {
  Moment write, read[2];
  bool written, write_atomic, read_atomic[2];
  uint8_t reads;
};

// Anonymous memory that costs only the pages touched.
class Pages {
public:
  Pages() = default;
  explicit Pages(uint64_t bytes);
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Pages();

  char* data() const { return data_; }

private:
  void swap(Pages& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// A bit for each byte of a buffer.
class Touched {
public:
  explicit Touched(uint64_t size) : size_(size), words_(size / 64 + 2) {}
  void set(uint64_t offset, uint64_t count) {
    for (; count > 64; offset += 64, count -= 64)
      set(offset, 64);
    const uint64_t mask = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    words_[offset / 64] |= mask << offset % 64;
    if (offset % 64)
      words_[offset / 64 + 1] |= mask >> (64 - offset % 64);
  }
  std::vector<msl_range> ranges() const;

private:
  bool at(uint64_t i) const { return words_[i / 64] >> i % 64 & 1; }
  uint64_t size_;
  std::vector<uint64_t> words_;
};

// What the kernel may touch under one name.
struct Region {
  uint64_t begin, end;
  std::string name;
  bool writable, unwritten;
  Touched read, written;
};

// Memory of one piece: buffers that overlap share it, and threadgroup variables are one each.
struct Block {
  uint64_t begin, end;
  Pages storage; // where the dispatch has moved it to
  Byte* bytes;   // begin..end; nullptr where nothing is ever written
  Pages byte_pages;
  Region* only; // its region, if that is all of it
};

} // namespace msl::checker
