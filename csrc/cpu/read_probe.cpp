#include "read_probe.h"

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace q4metal::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kAhead = 4096; // bytes of prefetch distance

// Four sums keep the additions from becoming the limit.
uint64_t sum_words(const uint64_t* words, size_t count) {
  uint64_t sums[4] = {};
  for (size_t i = 0; i + 32 <= count; i += 32) {
    for (size_t line = 0; line < 32; line += 8)
      __builtin_prefetch(reinterpret_cast<const char*>(words + i + line) + kAhead);
    for (size_t j = 0; j < 32; j += 4)
      for (size_t k = 0; k < 4; ++k)
        sums[k] += words[i + j + k];
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

} // namespace

std::vector<double> read_probe(size_t bytes, int threads, int repeats) {
  const size_t part = (bytes / threads + kHugePage - 1) / kHugePage * kHugePage;
  std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(kHugePage, part * threads),
                                                     &std::free);
  if (!memory)
    throw std::bad_alloc();
#if defined(__linux__)
  madvise(memory.get(), part * threads, MADV_HUGEPAGE); // a file in the page cache is read as fast
#endif
  struct Probe {
    char* base;
    size_t part;
    bool fill;
    std::atomic<uint64_t> sink{0};
  } probe{static_cast<char*>(memory.get()), part, true};
  const auto pass = [](void* context, int thread) {
    auto& p = *static_cast<Probe*>(context);
    auto* words = reinterpret_cast<uint64_t*>(p.base + p.part * thread);
    const size_t count = p.part / sizeof(uint64_t);
    if (p.fill) {
      for (size_t i = 0; i < count; ++i)
        words[i] = i * 2654435761u;
    }
    p.sink.fetch_add(sum_words(words, count));
  };
  run_on_team(threads, pass, &probe);
  probe.fill = false;
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run_on_team(threads, pass, &probe);
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

} // namespace q4metal::cpu
