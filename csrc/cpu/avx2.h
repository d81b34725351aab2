// What the AVX2 kernels share. Everything after this header, itself included, compiles for AVX2,
// FMA, F16C and BMI2: include it last, and run nothing of it before dispatch.cpp has looked at the
// CPU.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "float_types.h"
#include "kernels.h"
#include "prefetch.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

// Lets vector_math.h use instructions that the compiler does not find by itself.
#define Q4_AVX2 1

namespace q4metal::cpu {

// The functions of the integer kernels, for fast and int8. Functions, not kernels: a table made of
// their addresses needs no code to run when the library is loaded.
template <Precision kPrecision> struct Avx2Matvec {
  static size_t prepared_bytes(const PackedMatrix& w, int64_t rows);
  static void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared);
  static void run(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                  int64_t begin, int64_t end);
};

template <Precision kPrecision> struct Avx2Gemm {
  static size_t prepared_bytes(const PackedMatrix& w, int64_t rows);
  static void prepare(const PackedMatrix& w, const float* x, int64_t rows, int64_t first,
                      int64_t last, std::byte* prepared);
  static void run(const PackedMatrix& w, const float* x, const std::byte* prepared, int64_t rows,
                  float* y, int64_t begin, int64_t end);
};

namespace {

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

Q4_INLINE __m256 load8(const void* values, DType dtype) {
  const auto* p = static_cast<const __m128i*>(values);
  switch (dtype) {
  case DType::f32:
    return _mm256_loadu_ps(static_cast<const float*>(values));
  case DType::f16:
    return _mm256_cvtph_ps(_mm_loadu_si128(p));
  case DType::bf16:
    break;
  }
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}

// All bits of the first `count` lanes, 0..8.
Q4_INLINE __m256 group_mask(int64_t count) {
  alignas(32) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_ps(reinterpret_cast<const float*>(kMask + 8 - count));
}

// Scales or biases [index, index + 8) of all N * groups of a matrix, zeros in place of those from
// `count` on. They belong to the next row, so a whole vector may be read, except at the end of the
// array. The dtype is a branch that is always predicted, not a template parameter, which would
// triple the build.
Q4_INLINE __m256 load_groups(const PackedMatrix& w, const void* values, int64_t index,
                             int64_t count) {
  const int64_t size = size_of(w.scales_dtype);
  const auto* p = static_cast<const std::byte*>(values) + index * size;
  if (count >= 8)
    return load8(p, w.scales_dtype);
  if (index + 8 <= w.out_features * w.groups())
    return _mm256_and_ps(load8(p, w.scales_dtype), group_mask(count));
  alignas(32) std::byte padded[32] = {};
  std::memcpy(padded, p, count * size);
  return load8(padded, w.scales_dtype);
}

// Codes 8 * eighth and the seven after it of a run of 32, as a bit stream. A read of eight bytes
// that would pass the end of the run is moved back inside it: 32 codes are at least eight bytes.
template <int kBits> Q4_INLINE uint64_t eight_codes(const uint8_t* run, int eighth) {
  constexpr int kLast = 4 * kBits - 8;
  const int begin = eighth * kBits;
  uint64_t stream;
  std::memcpy(&stream, run + std::min(begin, kLast), 8);
  return begin > kLast ? stream >> (8 * (begin - kLast)) : stream;
}

// Lane pairs 4, 2, 1 apart are added, in this order.
Q4_INLINE float horizontal_sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Calls f.template operator()<bits, group_size>() for the format of w.
template <int kBits, typename F> void for_group_size(const PackedMatrix& w, const F& f) {
  switch (w.group_size) {
  case 32:
    return f.template operator()<kBits, 32>();
  case 64:
    return f.template operator()<kBits, 64>();
  default:
    return f.template operator()<kBits, 128>();
  }
}

template <typename F> void for_format(const PackedMatrix& w, const F& f) {
  switch (w.bits) {
  case 2:
    return for_group_size<2>(w, f);
  case 3:
    return for_group_size<3>(w, f);
  case 4:
    return for_group_size<4>(w, f);
  case 5:
    return for_group_size<5>(w, f);
  case 6:
    return for_group_size<6>(w, f);
  default:
    return for_group_size<8>(w, f);
  }
}

} // namespace
} // namespace q4metal::cpu
