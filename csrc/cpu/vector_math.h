// Vectors, and a model's arithmetic beside packed matrices and attention: norms, RoPE, SwiGLU,
// dense matrices. Written once with compiler vectors and compiled by every instruction set's file,
// under that file's target (vector_kernels.h). All sums have a fixed order that does not depend on
// the width of the machine's vectors.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "exponential.h"
#include "float_types.h"
#include "kernels.h"

namespace q4metal::cpu {
namespace {

typedef float Vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(32), aligned(4)));
constexpr int kWidth = 8;

Q4_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
Q4_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
Q4_INLINE Vec splat(float x) { return Vec{} + x; }

Q4_INLINE float sum_of(Vec v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <int... kLanes> Q4_INLINE Vec shuffle(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, kLanes...);
}

// sum_of for eight vectors at once, in the same order: three additions a vector less a shuffle
// each.
Q4_INLINE Vec sums_of(const Vec* v) {
  Vec fours[4]; // of vectors i and i + 4
  for (int i = 0; i < 4; ++i)
    fours[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(v[i], v[i + 4]) +
               shuffle<4, 5, 6, 7, 12, 13, 14, 15>(v[i], v[i + 4]);
  Vec twos[2];
  for (int i = 0; i < 2; ++i)
    twos[i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(fours[2 * i], fours[2 * i + 1]) +
              shuffle<2, 10, 3, 11, 6, 14, 7, 15>(fours[2 * i], fours[2 * i + 1]);
  return shuffle<0, 1, 8, 9, 4, 5, 12, 13>(twos[0], twos[1]) +
         shuffle<2, 3, 10, 11, 6, 7, 14, 15>(twos[0], twos[1]);
}

#if defined(__aarch64__)
Q4_INLINE float32x4_t low_half(Vec v) {
  return (float32x4_t)__builtin_shufflevector(v, v, 0, 1, 2, 3);
}
Q4_INLINE float32x4_t high_half(Vec v) {
  return (float32x4_t)__builtin_shufflevector(v, v, 4, 5, 6, 7);
}
Q4_INLINE Vec joined(float32x4_t low, float32x4_t high) {
  return (Vec)__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
#endif

// a * b + c; the project compiles with -ffp-contract=off, so fusing has to be asked for.
Q4_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(Q4_AVX2)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return joined(vfmaq_f32(low_half(c), low_half(a), low_half(b)),
                vfmaq_f32(high_half(c), high_half(a), high_half(b)));
#else
  return a * b + c;
#endif
}

// The widest vectors of this instruction set.
#ifndef Q4_WIDE_BYTES
#define Q4_WIDE_BYTES 32
#endif
constexpr int kWide = Q4_WIDE_BYTES / 4;
typedef float WideVec __attribute__((vector_size(Q4_WIDE_BYTES), aligned(4)));
typedef int32_t WideInt __attribute__((vector_size(Q4_WIDE_BYTES), aligned(4)));

Q4_INLINE WideVec load_wide(const float* p) { return *reinterpret_cast<const WideVec*>(p); }
Q4_INLINE void store_wide(float* p, WideVec v) { *reinterpret_cast<WideVec*>(p) = v; }
Q4_INLINE WideVec splat_wide(float x) { return WideVec{} + x; }

#if Q4_WIDE_BYTES == 64
Q4_INLINE WideVec multiply_add(WideVec a, WideVec b, WideVec c) {
  return (WideVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#endif

Q4_INLINE Vec widen8(const float* p) { return load(p); }

// Half or BFloat16.
template <typename T> Q4_INLINE Vec widen8(const T* p) {
#if defined(Q4_AVX2)
  return (Vec)load8(p, std::is_same_v<T, Half> ? DType::f16 : DType::bf16);
#elif defined(__aarch64__)
  uint16x8_t bits;
  std::memcpy(&bits, p, sizeof bits);
  if constexpr (std::is_same_v<T, Half>) {
    const float16x8_t halves = vreinterpretq_f16_u16(bits);
    return joined(vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves));
  } else {
    return joined(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
                  vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16)));
  }
#else
  float wide[kWidth];
  for (int i = 0; i < kWidth; ++i)
    wide[i] = widen(p[i]);
  return load(wide);
#endif
}

// Vectors of any size.
template <int kBytes> struct Lanes {
  typedef float Float __attribute__((vector_size(kBytes)));
  typedef int32_t Int __attribute__((vector_size(kBytes)));
};

template <int kBytes>
Q4_INLINE typename Lanes<kBytes>::Float exp_lanes(typename Lanes<kBytes>::Float x) {
  using Float = typename Lanes<kBytes>::Float;
  return exponential<Float, typename Lanes<kBytes>::Int>(
      x, [](Float a, Float b, Float c)
             __attribute__((always_inline)) { return multiply_add(a, b, c); });
}

Q4_INLINE Vec exp8(Vec x) { return exp_lanes<sizeof(Vec)>(x); }
Q4_INLINE float exp1(float x) { return exp8(splat(x))[0]; }

// out = gamma * x; returns 1 / rms(x). n of any size; the tail is one short vector.
float norm_gamma(const float* x, const float* gamma, int64_t n, float eps, float* out) {
  Vec squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kWidth);
      squares[j] += v * v;
      store(out + i + j * kWidth, v * load(gamma + i + j * kWidth));
    }
  float rest = 0;
  for (; i < n; ++i) {
    rest += x[i] * x[i];
    out[i] = x[i] * gamma[i];
  }
  const float total = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest;
  return 1.0f / std::sqrt(total / float(n) + eps);
}

void scale(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    x[i] *= factor;
}

void add(const float* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide)
    store_wide(out + i, load_wide(out + i) + load_wide(x + i));
  for (; i < n; ++i)
    out[i] += x[i];
}

// Rotates one head in halves, i and i + dim / 2 together: x cos + (x with its halves exchanged)
// sin. The sines come signed, negative in the first half.
void rope(const float* head, const float* cos, const float* sin, int64_t dim, float* out) {
  const int64_t half = dim / 2;
  const auto rotate = [&]<typename T>(const T& load_at, int64_t i, const auto& store_at) {
    const auto a = load_at(head + i), b = load_at(head + i + half);
    store_at(out + i, a * load_at(cos + i) + b * load_at(sin + i));
    store_at(out + i + half, b * load_at(cos + i + half) + a * load_at(sin + i + half));
  };
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth)
    rotate([](const float* p) { return load(p); }, i, [](float* p, Vec v) { store(p, v); });
  for (; i < half; ++i)
    rotate([](const float* p) { return *p; }, i, [](float* p, float v) { *p = v; });
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const WideVec g = load_wide(gate + i);
    store_wide(out + i, g / (1.0f + exp_lanes<Q4_WIDE_BYTES>(-g)) * load_wide(up + i));
  }
  for (; i < n; ++i)
    out[i] = gate[i] / (1.0f + exp1(-gate[i])) * up[i];
}

float sum_exp(const float* x, int64_t n, float most, float temperature) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j)
      sums[j] += exp8((load(x + i + j * kWidth) - most) / temperature);
  float rest = 0;
  for (; i < n; ++i)
    rest += exp1((x[i] - most) / temperature);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

Q4_INLINE void narrow8(Vec v, float* out) { store(out, v); }

Q4_INLINE void narrow8(Vec v, Half* out) {
#if defined(Q4_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)v, 0)); // to nearest
#elif defined(__aarch64__)
  const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(low_half(v)), high_half(v));
  std::memcpy(out, &halves, sizeof halves);
#else
  for (int i = 0; i < kWidth; ++i)
    out[i] = narrow<Half>(v[i]);
#endif
}

Q4_INLINE void narrow8(Vec v, BFloat16* out) {
  const IntVec bits = (IntVec)v;
  const IntVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const IntVec upper = (v == v ? rounded >> 16 : bits >> 16 | 0x40) & 0xffff;
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  const Shorts shorts = __builtin_convertvector(upper, Shorts);
  std::memcpy(out, &shorts, sizeof shorts);
}

void narrow_row(const float* x, int64_t n, DType dtype, void* out) {
  with_type(dtype, [&]<typename T>() {
    auto* to = static_cast<T*>(out);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
      narrow8(load(x + i), to + i);
    for (; i < n; ++i)
      to[i] = narrow<T>(x[i]);
  });
}

// The eight partial sums of x . w over the whole vectors of n.
template <typename T> Q4_INLINE Vec dot_lanes(const float* x, const T* w, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j)
      sums[j] = multiply_add(load(x + i + j * kWidth), widen8(w + i + j * kWidth), sums[j]);
  for (; i + kWidth <= n; i += kWidth)
    sums[0] = multiply_add(load(x + i), widen8(w + i), sums[0]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename T> Q4_INLINE float dot(const float* x, const T* w, int64_t n) {
  float rest = 0;
  for (int64_t i = n / kWidth * kWidth; i < n; ++i)
    rest += x[i] * widen(w[i]);
  return sum_of(dot_lanes(x, w, n)) + rest;
}

template <typename T>
void dense_rows(const DenseMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                int64_t end) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t m = 0; m < rows; ++m)
      y[m * w.out_features + n] =
          dot(x + m * w.in_features, static_cast<const T*>(w.weight) + n * w.in_features,
              w.in_features);
}

void dense_matvec(const DenseMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                  int64_t end) {
  with_type(w.dtype, [&]<typename T>() { dense_rows<T>(w, x, rows, y, begin, end); });
}

} // namespace
} // namespace q4metal::cpu
