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

// Four sums, so that additions are never the limit; eight would not fit the registers of plain
// x86-64.
typedef uint64_t Vec __attribute__((vector_size(32)));

template <bool kPrefetch> uint64_t sum_words(const uint64_t* words, size_t count) {
  const Vec* vectors = reinterpret_cast<const Vec*>(words);
  Vec sums[4] = {};
  for (size_t i = 0; i + 8 <= count / 4; i += 8)
    for (size_t j = 0; j < 8; ++j) {
      if (kPrefetch && j % 2 == 0)
        __builtin_prefetch(reinterpret_cast<const char*>(vectors + i + j) + kAhead);
      sums[j % 4] += vectors[i + j];
    }
  uint64_t total = 0;
  for (const Vec& sum : sums)
    total += sum[0] + sum[1] + sum[2] + sum[3];
  return total;
}

} // namespace

std::vector<double> read_probe(size_t bytes, int threads, int repeats, bool prefetch) {
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
    bool fill, prefetch;
    std::atomic<uint64_t> sink{0};
  } probe{static_cast<char*>(memory.get()), part, true, prefetch};
  const auto pass = [](void* context, int thread) {
    auto& p = *static_cast<Probe*>(context);
    auto* words = reinterpret_cast<uint64_t*>(p.base + p.part * thread);
    const size_t count = p.part / sizeof(uint64_t);
    if (p.fill) {
      for (size_t i = 0; i < count; ++i)
        words[i] = i * 2654435761u;
    }
    p.sink.fetch_add(p.prefetch ? sum_words<true>(words, count) : sum_words<false>(words, count));
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
