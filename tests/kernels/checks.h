// The parts of the test, each for one table.
#pragma once

#include "../../csrc/cpu/kernels.h"
#include "report.h"
#include "shapes.h"

namespace q4metal::cpu::tests {

// matvec, gemm and gemm_transposed of one shape, against float64 and, bit for bit, against ref.
void check_products(const KernelTable& table, const Case& c, uint32_t seed, Report& report);

// Sums as large as they get, for integer kernels that might overflow.
void check_largest_sums(const KernelTable& table, Report& report);

// What decoding computes beside packed matrices, against float64.
void check_vector_kernels(const KernelTable& table, Report& report);

struct TimingOptions {
  int bits = 4;
  int precision = -1; // all
  int64_t rows = 0;   // all
  bool hot = false;   // one copy of the matrix, which may stay in the cache
};

// Prints GB/s of packed weights for few rows, GFLOP/s for many.
void time_table(const KernelTable& table, const TimingOptions& options);

} // namespace q4metal::cpu::tests
