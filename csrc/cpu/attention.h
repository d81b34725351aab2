// Softmax attention of a decoded token over one split of its context, in blocks of the KV cache,
// whose products, maxima and sums have an order that does not depend on how many queries go
// together, nor on the width of the machine's vectors.
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
