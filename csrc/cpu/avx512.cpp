// The table for AVX-512 with VNNI. In float32 the products are AVX2's: they run on every CPU that
// has AVX-512.
#include <cmath>
#include <limits>
#include <type_traits>

#include "avx512.h" // from here on everything compiles for AVX-512

#define Q4_AVX2 1 // AVX-512 has all that vector_math.h asks for
#define Q4_WIDE_BYTES 64

namespace q4metal::cpu {
namespace {

// What vector_math.h widens 16-bit floats with.
Q4_INLINE __m256 load8(const void* values, DType dtype) {
  const __m128i v = _mm_loadu_si128(static_cast<const __m128i*>(values));
  return dtype == DType::f16 ? _mm256_cvtph_ps(v)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

} // namespace
} // namespace q4metal::cpu

#include "vector_kernels.h"

namespace q4metal::cpu {
namespace {

constexpr MatvecKernel exact_matvec = {
    [](const PackedMatrix& w, int64_t rows) {
      return avx2_kernels.matvec(Precision::exact).prepared_bytes(w, rows);
    },
    [](const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
      avx2_kernels.matvec(Precision::exact).prepare(w, x, rows, prepared);
    },
    [](const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
       int64_t end) {
      avx2_kernels.matvec(Precision::exact).run(w, prepared, rows, y, begin, end);
    }};

constexpr GemmKernel exact_gemm = {
    [](const PackedMatrix& w, int64_t rows) {
      return avx2_kernels.gemm(Precision::exact).prepared_bytes(w, rows);
    },
    [](const PackedMatrix& w, const float* x, int64_t rows, int64_t first, int64_t last,
       std::byte* prepared) {
      avx2_kernels.gemm(Precision::exact).prepare(w, x, rows, first, last, prepared);
    },
    [](const PackedMatrix& w, const float* x, const std::byte* prepared, int64_t rows, float* y,
       int64_t begin, int64_t end) {
      avx2_kernels.gemm(Precision::exact).run(w, x, prepared, rows, y, begin, end);
    }};

void gemm_transposed(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                     int64_t end) {
  avx2_kernels.gemm_transposed(w, x, rows, y, begin, end);
}

template <Precision kPrecision>
constexpr MatvecKernel matvec = {Avx512Matvec<kPrecision>::prepared_bytes,
                                 Avx512Matvec<kPrecision>::prepare, Avx512Matvec<kPrecision>::run};

template <Precision kPrecision>
constexpr GemmKernel gemm = {Avx512Gemm<kPrecision>::prepared_bytes,
                             Avx512Gemm<kPrecision>::prepare, Avx512Gemm<kPrecision>::run};

} // namespace

constinit const KernelTable avx512_kernels = {
    "avx512",
    {exact_matvec, matvec<Precision::fast>, matvec<Precision::int8>},
    {exact_gemm, gemm<Precision::fast>, gemm<Precision::int8>},
    gemm_transposed,
    vector_kernels};

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
