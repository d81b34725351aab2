#include "memory.h"

#include <sys/mman.h>

#include <new>

namespace msl::checker {

Pages::Pages(uint64_t bytes) : bytes_(bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    throw std::bad_alloc();
  data_ = static_cast<char*>(p);
}

Pages::~Pages() {
  if (data_)
    munmap(data_, bytes_);
}

std::vector<msl_range> Touched::ranges() const {
  std::vector<msl_range> found;
  for (uint64_t i = 0; i < size_;) {
    if (i % 64 == 0 && words_[i / 64] == 0) {
      i += 64;
      continue;
    }
    if (!at(i)) {
      i++;
      continue;
    }
    uint64_t begin = i;
    while (i < size_ && at(i))
      i += i % 64 == 0 && words_[i / 64] == ~uint64_t{0} ? 64 : 1;
    found.push_back({begin, i < size_ ? i : size_});
  }
  return found;
}

} // namespace msl::checker
