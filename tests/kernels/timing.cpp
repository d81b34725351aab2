#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../../csrc/cpu/threads.h"
#include "checks.h"

namespace q4metal::cpu::tests {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best of several calls, for about 0.3 s.
template <typename F> double best_seconds(const F& f) {
  f();
  double best = 1e9;
  const double start = seconds_now();
  for (int i = 0; i < 3 || seconds_now() - start < 0.3; ++i) {
    const double before = seconds_now();
    f();
    best = std::min(best, seconds_now() - before);
    if (seconds_now() - start > 2)
      break;
  }
  return best;
}

// Matrices of random bytes, more of them than a cache holds, so that weights come from memory.
// They lie in huge pages, as a loaded model's do.
struct Weights {
  std::unique_ptr<uint8_t, decltype(&std::free)> bytes{nullptr, &std::free};
  std::vector<PackedMatrix> matrices;

  Weights(const Shape& shape, bool hot) {
    PackedMatrix m{nullptr,           nullptr,          nullptr,   DType::f16, shape.out_features,
                   shape.in_features, shape.group_size, shape.bits};
    constexpr int64_t kBeyondCaches = 256 << 20;
    const int64_t count = hot ? 1 : std::max<int64_t>(1, kBeyondCaches / m.bytes());
    constexpr int64_t kHugePage = 2 << 20;
    const int64_t size = (count * m.bytes() + kHugePage - 1) / kHugePage * kHugePage;
    bytes.reset(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, size)));
    if (!bytes)
      throw std::bad_alloc();
#if defined(__linux__)
    madvise(bytes.get(), size, MADV_HUGEPAGE);
#endif
    Random random(5);
    for (int64_t i = 0; i < size; i += 4) {
      const uint32_t word = random.bits() & 0x3fff3fff; // as scales: finite
      std::memcpy(bytes.get() + i, &word, 4);
    }
    for (int64_t i = 0; i < count; ++i) {
      m.weight = bytes.get() + i * m.bytes();
      m.scales = m.weight + m.out_features * m.row_stride();
      m.biases = m.weight + (m.bytes() + m.out_features * m.row_stride()) / 2;
      matrices.push_back(m);
    }
  }
};

struct Timing {
  const KernelTable& table;
  const Weights& weights;
  const float* x;
  float* y;
  size_t next = 0; // the matrix that was used longest ago

  const PackedMatrix& matrix() { return weights.matrices[next++ % weights.matrices.size()]; }

  double matvec(Precision p, int64_t rows, int threads) {
    const MatvecKernel& kernel = table.matvec(p);
    const Prepared prepared(kernel.prepared_bytes(weights.matrices[0], rows));
    return best_seconds([&] {
      const PackedMatrix& w = matrix();
      kernel.prepare(w, x, rows, prepared.data());
      // As the executor shares them out: a part for each thread, in pieces of 64 features.
      parallel_pieces(threads, threads, 1, [&](int64_t thread, int64_t) {
        const int64_t last = w.out_features * (thread + 1) / threads;
        for (int64_t n = w.out_features * thread / threads; n < last; n += 64)
          kernel.run(w, prepared.data(), rows, y, n, std::min(n + 64, last));
      });
    });
  }

  double gemm(Precision p, int64_t rows, int threads) {
    const GemmKernel& kernel = table.gemm(p);
    const Prepared prepared(kernel.prepared_bytes(weights.matrices[0], rows));
    return best_seconds([&] {
      const PackedMatrix& w = matrix();
      parallel_pieces(threads, rows, kRowStep, [&](int64_t first, int64_t last) {
        kernel.prepare(w, x, rows, first, last, prepared.data());
      });
      // As prompts do.
      parallel_pieces(threads, w.out_features, kernel.piece(w, rows),
                      [&](int64_t begin, int64_t end) {
                        kernel.run(w, x, prepared.data(), rows, y, begin, end);
                      });
    });
  }
};

} // namespace

void time_table(const KernelTable& table, const TimingOptions& options) {
  const Shape shapes[] = {
      {options.bits, 64, DType::f16, 896, 4864},   {options.bits, 64, DType::f16, 4864, 896},
      {options.bits, 64, DType::f16, 3584, 18944}, {options.bits, 64, DType::f16, 18944, 3584},
      {options.bits, 64, DType::f16, 8960, 1536},  {options.bits, 32, DType::f16, 576, 1536}};
  std::printf("%s: GB/s of weights at 1..8 rows, GFLOP/s at 128 and 512\n", table.name);
  for (const Shape& shape : shapes) {
    constexpr int64_t kMostRows = 512;
    const Weights weights(shape, options.hot);
    Random random(7);
    const Floats x = activations(kMostRows * shape.in_features, random);
    const Floats y = floats(kMostRows * shape.out_features);
    Timing timing{table, weights, x.get(), y.get()};
    for (const Precision p : {Precision::exact, Precision::fast, Precision::int8}) {
      if (options.precision >= 0 && int(p) != options.precision)
        continue;
      for (const int threads : {1, 2}) {
        std::printf("%-40s %-5s threads %d:", name_of(shape).c_str(), name_of(p), threads);
        for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 128, 512}) {
          if (options.rows != 0 && rows != options.rows)
            continue;
          const bool few = rows <= kMaxMatvecRows;
          const double seconds =
              few ? timing.matvec(p, rows, threads) : timing.gemm(p, rows, threads);
          const double flops = 2.0 * double(rows * shape.in_features * shape.out_features);
          const double work = few ? double(weights.matrices[0].bytes()) : flops;
          std::printf(few ? "  %lld: %.2f GB/s" : "  %lld: %.1f GFLOP/s",
                      static_cast<long long>(rows), work / seconds / 1e9);
          std::fflush(stdout);
        }
        std::printf("\n");
      }
    }
  }
}

} // namespace q4metal::cpu::tests
