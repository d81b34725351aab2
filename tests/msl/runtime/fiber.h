// A fiber a GPU thread: its stack, and the switch from one to another.
#pragma once

#include <cstdint>
#include <sys/mman.h>

namespace msl {

// Saves the callee-saved registers on the stack, stores the stack pointer and goes on with the
// other stack. 6 pushes and pops: about 3 ns, where swapcontext with its system call takes 300.
extern "C" __attribute__((visibility("hidden"))) void msl_switch(void** save, void* load);

class Stacks {
public:
  static constexpr uint64_t kSize = 256 * 1024, kGuard = 4096;
  // Stacks below which there is one guard. All of a simdgroup have the same frames, so the first
  // one's tells; a guard each would cost two mappings, of which a process has 65530 at most, and
  // libraries stay loaded.
  static constexpr uint32_t kGuarded = 32;

  ~Stacks() { release(); }

  void reserve(uint32_t count) {
    if (count <= count_)
      return;
    release();
    void* p = mmap(nullptr, count * kSize, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
      return;
    memory_ = static_cast<char*>(p);
    count_ = count;
    for (uint32_t i = 0; i < count; i += kGuarded)
      if (mprotect(memory_ + i * kSize, kGuard, PROT_NONE) != 0)
        return release();
  }

  // A stack pointer from which msl_switch enters `entry`. Tops are staggered: at equal offsets the
  // stacks of 32 lanes would share the same few cache sets.
  void* start(uint32_t i, void (*entry)()) const {
    char* top = memory_ + (i + 1) * kSize - 64 - (i * 1088) % 65536;
    void** sp = reinterpret_cast<void**>(top);
    *sp = reinterpret_cast<void*>(entry);
    for (int r = 0; r < 6; r++)
      *--sp = nullptr;
    return sp;
  }

  uint64_t begin() const { return reinterpret_cast<uint64_t>(memory_); }
  uint64_t end() const { return begin() + count_ * kSize; }
  uint32_t count() const { return count_; }

private:
  void release() {
    if (memory_)
      munmap(memory_, count_ * kSize);
    memory_ = nullptr;
    count_ = 0;
  }

  char* memory_ = nullptr;
  uint32_t count_ = 0;
};

} // namespace msl
