// What the AVX2 kernels share. Everything after this header, itself included, compiles for AVX2,
// FMA, F16C and BMI2: include it last, and run nothing of it before dispatch.cpp has looked at the
// CPU.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "float_types.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

namespace q4metal::cpu {

extern const MatvecKernel avx2_split_matvec;

namespace {

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

constexpr int64_t kPrefetchAhead = 1024; // bytes ahead in the one sequential stream of weights

template <typename T> __m256 load8(const T* values);

template <> inline __m256 load8<float>(const float* values) { return _mm256_loadu_ps(values); }

template <> inline __m256 load8<Half>(const Half* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

template <> inline __m256 load8<BFloat16>(const BFloat16* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Up to eight values, zeros behind them: a vector load would pass the end of the last row.
template <typename T> __m256 load_tail(const T* values, int64_t count) {
  T padded[8] = {};
  std::copy(values, values + count, padded);
  return load8(padded);
}

template <typename T> __m256 load_groups(const T* values, int64_t count) {
  return count >= 8 ? load8(values) : load_tail(values, count);
}

// Codes 8 * eighth and the seven after it of a run of 32, as a bit stream. A read of eight bytes
// that would pass the end of the run is moved back inside it: 32 codes are at least eight bytes.
template <int kBits> uint64_t eight_codes(const uint8_t* run, int eighth) {
  constexpr int kLast = 4 * kBits - 8;
  const int begin = eighth * kBits;
  uint64_t stream;
  std::memcpy(&stream, run + std::min(begin, kLast), 8);
  return begin > kLast ? stream >> (8 * (begin - kLast)) : stream;
}

// Lane pairs 4, 2, 1 apart are added, in this order.
inline float horizontal_sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Calls f.template operator()<bits, group_size, S>() for the format of w; S is the scales' type.
template <int kBits, typename S, typename F>
void for_group_size(const PackedMatrix& w, const F& f) {
  switch (w.group_size) {
  case 32:
    return f.template operator()<kBits, 32, S>();
  case 64:
    return f.template operator()<kBits, 64, S>();
  default:
    return f.template operator()<kBits, 128, S>();
  }
}

template <typename S, typename F> void for_bits(const PackedMatrix& w, const F& f) {
  switch (w.bits) {
  case 2:
    return for_group_size<2, S>(w, f);
  case 3:
    return for_group_size<3, S>(w, f);
  case 4:
    return for_group_size<4, S>(w, f);
  case 5:
    return for_group_size<5, S>(w, f);
  case 6:
    return for_group_size<6, S>(w, f);
  default:
    return for_group_size<8, S>(w, f);
  }
}

template <typename F> void for_format(const PackedMatrix& w, const F& f) {
  switch (w.scales_dtype) {
  case DType::f32:
    return for_bits<float>(w, f);
  case DType::f16:
    return for_bits<Half>(w, f);
  case DType::bf16:
    return for_bits<BFloat16>(w, f);
  }
}

} // namespace
} // namespace q4metal::cpu
