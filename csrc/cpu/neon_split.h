// Activations as integers (split.h) for NEON, for the matvec and the GEMMs alike. A row is, per 32
// columns, the bytes of its integers: 32 high and 32 low ones for fast, 32 for int8. High is (x16 +
// 128) >> 8, low the remainder, both signed. Where W has 4 bits, even columns come before odd ones,
// as a vector of packed bytes gives them. Then per group, padded with zeros to whole vectors: sx,
// float(sum of x16) * sx, and for 8 bits 128 * sum of x16.
#pragma once

#include "split.h"

#include "neon.h" // from here on everything compiles for NEON with dot products

namespace q4metal::cpu {

// A GEMM of rows that neon_split.cpp prepared, with the instructions of i8mm: only for CPUs that
// have it (has_i8mm).
template <Precision kPrecision>
void neon_i8mm_gemm(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                    int64_t begin, int64_t end);

namespace {

constexpr int planes_of(Precision precision) { return precision == Precision::int8 ? 1 : 2; }

struct PreparedRow {
  int64_t codes, groups; // bytes, elements

  PreparedRow(const PackedMatrix& w, int planes)
      : codes(w.in_features * planes), groups((w.groups() + 3) / 4 * 4) {}
  int64_t bytes() const { return (codes + 12 * groups + 63) / 64 * 64; }
  const float* scales(const std::byte* row) const {
    return reinterpret_cast<const float*>(row + codes);
  }
  const float* sums(const std::byte* row) const { return scales(row) + groups; }
  const int32_t* offsets(const std::byte* row) const {
    return reinterpret_cast<const int32_t*>(sums(row) + groups);
  }
};

} // namespace
} // namespace q4metal::cpu
