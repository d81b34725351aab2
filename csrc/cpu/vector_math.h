// Decode's arithmetic beside the matrices: norms, RoPE, SwiGLU, attention, dense matrices. Written
// once with compiler vectors and compiled by every instruction set's file that includes it, last,
// under that file's target. All sums have a fixed order that does not depend on the width of the
// machine's vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

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

// The widest vectors of this instruction set, for what prompts need.
#ifndef Q4_WIDE_BYTES
#define Q4_WIDE_BYTES 32
#endif
typedef float WideVec __attribute__((vector_size(Q4_WIDE_BYTES), aligned(4)));
constexpr int kWide = Q4_WIDE_BYTES / 4;

Q4_INLINE WideVec load_wide(const float* p) { return *reinterpret_cast<const WideVec*>(p); }
Q4_INLINE void store_wide(float* p, WideVec v) { *reinterpret_cast<WideVec*>(p) = v; }

Q4_INLINE WideVec multiply_add_wide(WideVec a, WideVec b, WideVec c) {
#if Q4_WIDE_BYTES == 64
  return (WideVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return multiply_add(a, b, c);
#endif
}

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

// e^x for x <= 0 or moderate x, relative error below 2e-7: 2^n times a polynomial on [-ln2/2,
// ln2/2].
Q4_INLINE Vec exp8(Vec x) {
  const Vec low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec shift = splat(12582912.0f); // 1.5 * 2^23: the sum's low bits are n
  const Vec shifted = x * 1.44269504f + shift;
  const Vec n = shifted - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4b400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

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

// Rotates one head in halves, i and i + dim / 2 together: x cos + (x with its halves exchanged)
// sin. The sines come signed, negative in the first half.
void rope(float* head, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] + b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// gate = silu(gate) * up.
void swiglu(float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec g = load(gate + i);
    store(gate + i, g / (1.0f + exp8(-g)) * load(up + i));
  }
  for (; i < n; ++i)
    gate[i] = gate[i] / (1.0f + exp1(-gate[i])) * up[i];
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
  switch (w.dtype) {
  case DType::f32:
    return dense_rows<float>(w, x, rows, y, begin, end);
  case DType::f16:
    return dense_rows<Half>(w, x, rows, y, begin, end);
  case DType::bf16:
    return dense_rows<BFloat16>(w, x, rows, y, begin, end);
  }
}

// ---- attention

constexpr int kBlock = AttentionSplit::kBlockPositions;
// Query heads, and keys, that meet at a time: twelve sums, four keys in 16 registers.
constexpr int kQueries = 3, kKeys = 4;

// Scores of a block's 32 keys for kQ queries: scores[q][p]. A product's order is that of its
// vectors, in one chain, whatever kQ is. Keys behind the block's last one get scores too.
template <int kQ, typename T>
Q4_INLINE void score_block(const float* query, const T* keys, int64_t dim, float scale,
                           float (*scores)[kBlock]) {
  for (int first = 0; first < kBlock; first += kWidth) {
    Vec lanes[kQ][kWidth];
    for (int half = 0; half < kWidth; half += kKeys) {
      const T* key = keys + (first + half) * dim;
      Vec sums[kKeys][kQ] = {};
      for (int64_t i = 0; i < dim; i += kWidth)
        for (int j = 0; j < kKeys; ++j) {
          const Vec k = widen8(key + j * dim + i);
          for (int q = 0; q < kQ; ++q)
            sums[j][q] = multiply_add(k, load(query + q * dim + i), sums[j][q]);
        }
      for (int j = 0; j < kKeys; ++j)
        for (int q = 0; q < kQ; ++q)
          lanes[q][half + j] = sums[j][q];
    }
    for (int q = 0; q < kQ; ++q)
      store(scores[q] + first, sums_of(lanes[q]) * scale);
  }
}

// The same for a head size that is no multiple of eight.
template <int kQ, typename T>
void score_ragged(const float* query, const T* keys, int64_t dim, float scale, int count,
                  float (*scores)[kBlock]) {
  for (int q = 0; q < kQ; ++q)
    for (int p = 0; p < count; ++p)
      scores[q][p] = dot(query + q * dim, keys + p * dim, dim) * scale;
}

// Scores become weights e^(score - maximum), the ones from `count` on zero. `state` is maximum and
// sum so far; returns what earlier sums are to be multiplied with.
Q4_INLINE float soften(float* scores, int count, float* state) {
  for (int p = count; p < kBlock; ++p)
    scores[p] = -std::numeric_limits<float>::infinity();
  Vec top = splat(state[0]);
  for (int p = 0; p < kBlock; p += kWidth) {
    const Vec v = load(scores + p);
    top = v > top ? v : top;
  }
  float largest = top[0];
  for (int i = 1; i < kWidth; ++i)
    largest = std::max(largest, top[i]);
  // Where nothing came before, e^-87 instead of 0: it meets zeros only.
  const float rescale = exp1(state[0] - largest);
  for (int p = 0; p < kBlock; p += kWidth)
    store(scores + p, exp8(load(scores + p) - largest));
  for (int p = count; p < kBlock; ++p)
    scores[p] = 0.0f;
  Vec total = {};
  for (int p = 0; p < kBlock; p += kWidth)
    total += load(scores + p);
  state[0] = largest;
  state[1] = state[1] * rescale + sum_of(total);
  return rescale;
}

// out[q] = out[q] * rescale[q] + weights[q] . values, position by position.
template <int kQ, typename T>
Q4_INLINE void weigh_block(const float (*weights)[kBlock], const float* rescale, const T* values,
                           int64_t dim, int count, float* out, int64_t stride) {
  constexpr int kChains = 4; // vectors of a query's output at a time
  int64_t i = 0;
  for (; i + kChains * kWidth <= dim; i += kChains * kWidth) {
    Vec sums[kQ][kChains];
    for (int q = 0; q < kQ; ++q)
      for (int j = 0; j < kChains; ++j)
        sums[q][j] = load(out + q * stride + i + j * kWidth) * rescale[q];
    for (int p = 0; p < count; ++p)
      for (int j = 0; j < kChains; ++j) {
        const Vec v = widen8(values + p * dim + i + j * kWidth);
        for (int q = 0; q < kQ; ++q)
          sums[q][j] = multiply_add(v, splat(weights[q][p]), sums[q][j]);
      }
    for (int q = 0; q < kQ; ++q)
      for (int j = 0; j < kChains; ++j)
        store(out + q * stride + i + j * kWidth, sums[q][j]);
  }
  for (; i < dim; ++i)
    for (int q = 0; q < kQ; ++q) {
      float sum = out[q * stride + i] * rescale[q];
      for (int p = 0; p < count; ++p)
        sum += widen(values[p * dim + i]) * weights[q][p];
      out[q * stride + i] = sum;
    }
}

// One block for kQ queries, of which each sees its first `counts` positions. Per query, `out` has
// dim values, then maximum and sum.
template <int kQ, typename T>
void attend_block(const T* keys, const T* values, const float* query, int64_t dim, float scale,
                  const int* counts, float* out) {
  const int64_t stride = dim + 2;
  const int most = *std::max_element(counts, counts + kQ);
  alignas(32) float scores[kQ][kBlock];
  float rescale[kQ];
  if (dim % kWidth == 0)
    score_block<kQ>(query, keys, dim, scale, scores);
  else
    score_ragged<kQ>(query, keys, dim, scale, most, scores);
  for (int q = 0; q < kQ; ++q)
    rescale[q] = soften(scores[q], counts[q], out + q * stride + dim);
  weigh_block<kQ>(scores, rescale, values, dim, most, out, stride);
}

void start_attention(float* out, int64_t queries, int64_t dim) {
  for (int64_t q = 0; q < queries; ++q, out += dim + 2) {
    std::fill(out, out + dim, 0.0f);
    out[dim] = -std::numeric_limits<float>::infinity();
    out[dim + 1] = 0.0f;
  }
}

// Queries [0, queries) in threes, then what is left. A query's numbers are the same in any company.
// count(q): how many positions query q sees.
template <typename T, typename Count>
Q4_INLINE void attend_queries(const T* keys, const T* values, const float* query, int64_t queries,
                              int64_t dim, float scale, float* out, const Count& count) {
  int64_t q = 0;
  const auto some = [&]<int kQ>() {
    int counts[kQ];
    for (int i = 0; i < kQ; ++i)
      counts[i] = count(q + i);
    if (counts[kQ - 1] > 0) // later queries see more
      attend_block<kQ>(keys, values, query + q * dim, dim, scale, counts, out + q * (dim + 2));
    q += kQ;
  };
  while (q + kQueries <= queries)
    some.template operator()<kQueries>();
  if (queries - q == 2)
    some.template operator()<2>();
  else if (queries - q == 1)
    some.template operator()<1>();
}

// One split of the context for the query heads of one KV head, in blocks: running maximum, sum and
// weighted values, rescaled once a block.
template <typename T> void attend(const AttentionSplit& a) {
  start_attention(a.out, a.queries, a.head_dim);
  for (int64_t first = a.begin; first < a.end; first += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, a.end - first));
    attend_queries(static_cast<const T*>(a.key_block(a.context, first / kBlock)),
                   static_cast<const T*>(a.value_block(a.context, first / kBlock)), a.query,
                   a.queries, a.head_dim, a.scale, a.out, [&](int64_t) { return count; });
  }
}

// ---- attention of a prompt: many queries meet a block

// Queries that meet a block's keys at a time, two vectors of them: twelve sums.
constexpr int kRowQueries = 6;

// Keys [count, dim] in float32 as columns [dim, kBlock], zeros behind the last.
template <typename T>
void widen_columns(const T* keys, int64_t dim, int64_t count, float* columns) {
  std::fill(columns, columns + dim * kBlock, 0.0f);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < dim; ++i)
      columns[i * kBlock + p] = widen(keys[p * dim + i]);
}

template <typename T> void widen_values(const T* values, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    store(to + i, widen8(values + i));
  for (; i < count; ++i)
    to[i] = widen(values[i]);
}

// scores[q][p] for kQ queries; each product is one chain over dim.
template <int kQ>
Q4_INLINE void score_columns(const float* query, const float* columns, int64_t dim, float scale,
                             float (*scores)[kBlock]) {
  for (int first = 0; first < kBlock; first += 2 * kWide) {
    WideVec sums[kQ][2] = {};
    for (int64_t i = 0; i < dim; ++i) {
      const WideVec a = load_wide(columns + i * kBlock + first);
      const WideVec b = load_wide(columns + i * kBlock + first + kWide);
      for (int q = 0; q < kQ; ++q) {
        const WideVec x = WideVec{} + query[q * dim + i];
        sums[q][0] = multiply_add_wide(a, x, sums[q][0]);
        sums[q][1] = multiply_add_wide(b, x, sums[q][1]);
      }
    }
    for (int q = 0; q < kQ; ++q)
      for (int j = 0; j < 2; ++j)
        store_wide(scores[q] + first + j * kWide, sums[q][j] * scale);
  }
}

// Columns [first, first + kVectors * kWide) of out[q] = out[q] * rescale[q] + weights[q] . values.
template <int kQ, int kVectors>
Q4_INLINE void weigh_columns(const float (*weights)[kBlock], const float* rescale,
                             const float* values, int64_t dim, int count, float* out,
                             int64_t stride) {
  WideVec sums[kQ][kVectors];
  for (int q = 0; q < kQ; ++q)
    for (int j = 0; j < kVectors; ++j)
      sums[q][j] = load_wide(out + q * stride + j * kWide) * rescale[q];
  for (int p = 0; p < count; ++p) {
    WideVec v[kVectors];
    for (int j = 0; j < kVectors; ++j)
      v[j] = load_wide(values + p * dim + j * kWide);
    for (int q = 0; q < kQ; ++q) {
      const WideVec weight = WideVec{} + weights[q][p];
      for (int j = 0; j < kVectors; ++j)
        sums[q][j] = multiply_add_wide(v[j], weight, sums[q][j]);
    }
  }
  for (int q = 0; q < kQ; ++q)
    for (int j = 0; j < kVectors; ++j)
      store_wide(out + q * stride + j * kWide, sums[q][j]);
}

// One block for kQ queries, of which each sees its first `counts` positions.
template <int kQ>
void attend_columns(const float* columns, const float* values, const float* query, int64_t dim,
                    float scale, const int* counts, float* out) {
  const int64_t stride = dim + 2;
  const int most = *std::max_element(counts, counts + kQ);
  alignas(64) float scores[kQ][kBlock];
  float rescale[kQ];
  score_columns<kQ>(query, columns, dim, scale, scores);
  for (int q = 0; q < kQ; ++q)
    rescale[q] = soften(scores[q], counts[q], out + q * stride + dim);
  int64_t i = 0;
  for (; i + 2 * kWide <= dim; i += 2 * kWide)
    weigh_columns<kQ, 2>(scores, rescale, values + i, dim, most, out + i, stride);
  for (; i + kWide <= dim; i += kWide)
    weigh_columns<kQ, 1>(scores, rescale, values + i, dim, most, out + i, stride);
  for (; i < dim; ++i)
    for (int q = 0; q < kQ; ++q) {
      float sum = out[q * stride + i] * rescale[q];
      for (int p = 0; p < most; ++p)
        sum += values[p * dim + i] * scores[q][p];
      out[q * stride + i] = sum;
    }
}

// Some rows of a prompt for the query heads of one KV head. A block is widened once for all.
template <typename T> void attend_rows(const AttentionRows& a) {
  const int64_t dim = a.head_dim, queries = a.rows * a.heads, end = a.first + a.rows;
  float* const columns = a.scratch;
  float* const values = columns + kBlock * dim;
  float* const query = values + kBlock * dim;
  float* const out = query + queries * dim;
  for (int64_t r = 0; r < a.rows; ++r)
    std::copy_n(a.queries + r * a.stride, a.heads * dim, query + r * a.heads * dim);
  start_attention(out, queries, dim);
  for (int64_t first = 0; first < end; first += kBlock) {
    const int64_t size = std::min<int64_t>(kBlock, end - first);
    widen_columns(static_cast<const T*>(a.key_block(a.context, first / kBlock)), dim, size,
                  columns);
    widen_values(static_cast<const T*>(a.value_block(a.context, first / kBlock)), size * dim,
                 values);
    int64_t q = 0;
    const auto some = [&]<int kQ>() {
      int counts[kQ];
      for (int i = 0; i < kQ; ++i)
        counts[i] = int(std::clamp<int64_t>(a.first + (q + i) / a.heads + 1 - first, 0, kBlock));
      if (counts[kQ - 1] > 0) // later queries see more
        attend_columns<kQ>(columns, values, query + q * dim, dim, a.scale, counts,
                           out + q * (dim + 2));
      q += kQ;
    };
    while (q + kRowQueries <= queries)
      some.template operator()<kRowQueries>();
    while (q + 2 <= queries)
      some.template operator()<2>();
    while (q < queries)
      some.template operator()<1>();
  }
  for (int64_t q = 0; q < queries; ++q) {
    const float* from = out + q * (dim + 2);
    float* to = a.queries + q / a.heads * a.stride + q % a.heads * dim;
    const float inverse = 1.0f / from[dim + 1];
    for (int64_t i = 0; i < dim; ++i)
      to[i] = from[i] * inverse;
  }
}

void attention_split(const AttentionSplit& a) {
  switch (a.dtype) {
  case DType::f32:
    return attend<float>(a);
  case DType::f16:
    return attend<Half>(a);
  case DType::bf16:
    return attend<BFloat16>(a);
  }
}

void attention_rows(const AttentionRows& a) {
  switch (a.dtype) {
  case DType::f32:
    return attend_rows<float>(a);
  case DType::f16:
    return attend_rows<Half>(a);
  case DType::bf16:
    return attend_rows<BFloat16>(a);
  }
}

// Joins `splits` partial results of one head, `stride` floats apart, in their order.
void attention_combine(const float* partial, int64_t splits, int64_t stride, int64_t dim,
                       float* out) {
  float largest = partial[dim];
  for (int64_t s = 1; s < splits; ++s)
    largest = std::max(largest, partial[s * stride + dim]);
  std::fill(out, out + dim, 0.0f);
  float total = 0;
  for (int64_t s = 0; s < splits; ++s) {
    const float* part = partial + s * stride;
    const float factor = splits == 1 ? 1.0f : exp1(part[dim] - largest);
    total += part[dim + 1] * factor;
    for (int64_t i = 0; i < dim; ++i)
      out[i] += part[i] * factor;
  }
  const float inverse = 1.0f / total;
  for (int64_t i = 0; i < dim; ++i)
    out[i] *= inverse;
}

constexpr VectorKernels vector_kernels = {
    norm_gamma, rope, swiglu, dense_matvec, attention_split, attention_rows, attention_combine};

} // namespace
} // namespace q4metal::cpu
