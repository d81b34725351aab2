// Softmax attention of a decoded token over one split of its context, and of a prompt's rows. In
// blocks of the KV cache, whose products, maxima and sums have an order that does not depend on how
// many queries go together, nor on the width of the machine's vectors.
#pragma once

#include <algorithm>
#include <limits>

#include "vector_math.h"

namespace q4metal::cpu {
namespace {

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

// The first `count` positions of a block for kQ queries. Per query, `out` has dim values, then
// maximum and sum.
template <int kQ, typename T>
void attend_block(const T* keys, const T* values, const float* query, int64_t dim, float scale,
                  int count, float* out) {
  const int64_t stride = dim + 2;
  alignas(32) float scores[kQ][kBlock];
  float rescale[kQ];
  if (dim % kWidth == 0)
    score_block<kQ>(query, keys, dim, scale, scores);
  else
    score_ragged<kQ>(query, keys, dim, scale, count, scores);
  for (int q = 0; q < kQ; ++q)
    rescale[q] = soften(scores[q], count, out + q * stride + dim);
  weigh_block<kQ>(scores, rescale, values, dim, count, out, stride);
}

void start_attention(float* out, int64_t queries, int64_t dim) {
  for (int64_t q = 0; q < queries; ++q, out += dim + 2) {
    std::fill(out, out + dim, 0.0f);
    out[dim] = -std::numeric_limits<float>::infinity();
    out[dim + 1] = 0.0f;
  }
}

// One split of the context for the query heads of one KV head, in blocks: running maximum, sum and
// weighted values, rescaled once a block. Queries go in threes, then what is left; a query's
// numbers are the same in any company.
template <typename T> void attend(const AttentionSplit& a) {
  const int64_t dim = a.head_dim;
  start_attention(a.out, a.queries, dim);
  for (int64_t first = a.begin; first < a.end; first += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, a.end - first));
    const auto* keys = static_cast<const T*>(a.key_block(a.context, first / kBlock));
    const auto* values = static_cast<const T*>(a.value_block(a.context, first / kBlock));
    int64_t q = 0;
    const auto some = [&]<int kQ>() {
      attend_block<kQ>(keys, values, a.query + q * dim, dim, a.scale, count, a.out + q * (dim + 2));
      q += kQ;
    };
    while (q + kQueries <= a.queries)
      some.template operator()<kQueries>();
    if (a.queries - q == 2)
      some.template operator()<2>();
    else if (a.queries - q == 1)
      some.template operator()<1>();
  }
}

// ---- attention of a prompt: many queries meet a block

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

} // namespace
} // namespace q4metal::cpu
