// Softmax attention of a prompt's rows. Queries lie across the lanes, so there is no sum or maximum
// over lanes, and no number depends on how many queries go together or on the width of the
// machine's vectors. A block of the KV cache is widened to float32 once for all queries of a tile.
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"

namespace q4metal::cpu {
namespace {

// Queries at a time, two vectors; and keys, or columns of values, that meet them at a time.
constexpr int kLaneQueries = 2 * kWide;
constexpr int kMeet = kWide == 16 ? 8 : 4;
static_assert(AttentionRows::kMostLanes % kLaneQueries == 0);

Q4_INLINE void transpose8(Vec* v) {
  Vec a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = shuffle<0, 8, 2, 10, 4, 12, 6, 14>(v[i], v[i + 1]);
    a[i + 1] = shuffle<1, 9, 3, 11, 5, 13, 7, 15>(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + j] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a[i + j], a[i + j + 2]);
      b[i + j + 2] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a[i + j], a[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(b[i], b[i + 4]);
    v[i + 4] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(b[i], b[i + 4]);
  }
}

// Queries across lanes: lanes[i * kLaneQueries + q] = scale * row(q)[i], q < count.
template <typename Row>
void queries_to_lanes(const Row& row, int64_t count, int64_t dim, float scale, float* lanes) {
  if (count < kLaneQueries)
    std::fill(lanes, lanes + dim * kLaneQueries, 0.0f);
  int64_t q = 0;
  for (; q + kWidth <= count && dim % kWidth == 0; q += kWidth)
    for (int64_t i = 0; i < dim; i += kWidth) {
      Vec v[kWidth];
      for (int j = 0; j < kWidth; ++j)
        v[j] = load(row(q + j) + i) * scale;
      transpose8(v);
      for (int j = 0; j < kWidth; ++j)
        store(lanes + (i + j) * kLaneQueries + q, v[j]);
    }
  for (; q < count; ++q)
    for (int64_t i = 0; i < dim; ++i)
      lanes[i * kLaneQueries + q] = row(q)[i] * scale;
}

// And back: row(q)[i] = lanes[i * kLaneQueries + q] / sums[q].
template <typename Row>
void lanes_to_rows(const float* lanes, const float* sums, int64_t count, int64_t dim,
                   const Row& row) {
  int64_t q = 0;
  for (; q + kWidth <= count && dim % kWidth == 0; q += kWidth) {
    const Vec inverse = 1.0f / load(sums + q);
    for (int64_t i = 0; i < dim; i += kWidth) {
      Vec v[kWidth];
      for (int j = 0; j < kWidth; ++j)
        v[j] = load(lanes + (i + j) * kLaneQueries + q) * inverse;
      transpose8(v);
      for (int j = 0; j < kWidth; ++j)
        store(row(q + j) + i, v[j]);
    }
  }
  for (; q < count; ++q)
    for (int64_t i = 0; i < dim; ++i)
      row(q)[i] = lanes[i * kLaneQueries + q] * (1.0f / sums[q]);
}

// One group of queries on its way through the blocks.
struct LaneQueries {
  const float* query;           // [dim, kLaneQueries]
  float* out;                   // the same: weighted values
  float* largest;               // [kLaneQueries]: of the scores so far
  float* sums;                  // of their weights
  int32_t limits[kLaneQueries]; // positions that each sees
};

// scores[j] of kKeys keys; each product is one chain over dim.
template <int kKeys>
Q4_INLINE void score_keys(const float* query, const float* keys, int64_t dim,
                          float (*scores)[kLaneQueries]) {
  WideVec sums[kKeys][2] = {};
  for (int64_t i = 0; i < dim; ++i) {
    const WideVec a = load_wide(query + i * kLaneQueries);
    const WideVec b = load_wide(query + i * kLaneQueries + kWide);
    for (int j = 0; j < kKeys; ++j) {
      const float key = keys[j * dim + i];
      sums[j][0] = multiply_add(a, splat_wide(key), sums[j][0]);
      sums[j][1] = multiply_add(b, splat_wide(key), sums[j][1]);
    }
  }
  for (int j = 0; j < kKeys; ++j)
    for (int half = 0; half < 2; ++half)
      store_wide(scores[j] + half * kWide, sums[j][half]);
}

// Scores of positions [first, first + count) become weights e^(score - maximum), those behind a
// query's limit zero. Returns in `rescale` what earlier sums are to be multiplied with.
Q4_INLINE void soften_lanes(LaneQueries& q, int64_t first, int count, bool masked,
                            float (*scores)[kLaneQueries], float* rescale) {
  for (int half = 0; half < kLaneQueries; half += kWide) {
    const WideInt limit = *reinterpret_cast<const WideInt*>(q.limits + half) - int32_t(first);
    const WideVec before = load_wide(q.largest + half);
    WideVec top = before;
    for (int p = 0; p < count; ++p) {
      WideVec v = load_wide(scores[p] + half);
      if (masked) {
        v = WideInt{} + p < limit ? v : WideVec{} - std::numeric_limits<float>::infinity();
        store_wide(scores[p] + half, v);
      }
      top = v > top ? v : top;
    }
    // Where nothing came before, e^-87 instead of 0: it meets zeros only.
    const WideVec factor = exp_lanes<Q4_WIDE_BYTES>(before - top);
    WideVec sum = load_wide(q.sums + half) * factor;
    for (int p = 0; p < count; ++p) {
      WideVec weight = exp_lanes<Q4_WIDE_BYTES>(load_wide(scores[p] + half) - top);
      if (masked)
        weight = WideInt{} + p < limit ? weight : WideVec{};
      store_wide(scores[p] + half, weight);
      sum += weight;
    }
    store_wide(q.largest + half, top);
    store_wide(q.sums + half, sum);
    store_wide(rescale + half, factor);
  }
}

// out[i] = out[i] * rescale + weights . values[:, i] for kColumns columns, position by position.
template <int kColumns>
Q4_INLINE void weigh_lanes(const float (*weights)[kLaneQueries], const float* rescale,
                           const float* values, int64_t dim, int count, float* out) {
  WideVec sums[kColumns][2];
  for (int i = 0; i < kColumns; ++i)
    for (int half = 0; half < 2; ++half)
      sums[i][half] =
          load_wide(out + i * kLaneQueries + half * kWide) * load_wide(rescale + half * kWide);
  for (int p = 0; p < count; ++p) {
    const WideVec a = load_wide(weights[p]), b = load_wide(weights[p] + kWide);
    for (int i = 0; i < kColumns; ++i) {
      const float value = values[p * dim + i];
      sums[i][0] = multiply_add(a, splat_wide(value), sums[i][0]);
      sums[i][1] = multiply_add(b, splat_wide(value), sums[i][1]);
    }
  }
  for (int i = 0; i < kColumns; ++i)
    for (int half = 0; half < 2; ++half)
      store_wide(out + i * kLaneQueries + half * kWide, sums[i][half]);
}

// A block's positions [first, first + size) for one group.
void attend_lanes(LaneQueries& q, const float* keys, const float* values, int64_t dim,
                  int64_t first, int64_t size) {
  const int count = int(std::min<int64_t>(size, q.limits[kLaneQueries - 1] - first));
  alignas(64) float scores[kBlock][kLaneQueries], rescale[kLaneQueries];
  int p = 0;
  for (; p < count; p += kMeet)
    score_keys<kMeet>(q.query, keys + p * dim, dim, scores + p);
  soften_lanes(q, first, count, q.limits[0] < first + count, scores, rescale);
  int64_t i = 0;
  for (; i + kMeet <= dim; i += kMeet)
    weigh_lanes<kMeet>(scores, rescale, values + i, dim, count, q.out + i * kLaneQueries);
  for (; i < dim; ++i)
    weigh_lanes<1>(scores, rescale, values + i, dim, count, q.out + i * kLaneQueries);
}

// Keys or values [count, dim] as float32, zeros up to the next kMeet rows.
template <typename T> void widen_rows(const T* from, int64_t count, int64_t dim, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count * dim; i += kWidth)
    store(to + i, widen8(from + i));
  for (; i < count * dim; ++i)
    to[i] = widen(from[i]);
  std::fill(to + i, to + (count + kMeet - 1) / kMeet * kMeet * dim, 0.0f);
}

// Some rows of a prompt for the query heads of one KV head.
template <typename T> void attend_rows(const AttentionRows& a) {
  const int64_t dim = a.head_dim, queries = a.rows * a.heads, end = a.first + a.rows;
  const int64_t size = dim * kLaneQueries;
  float* const keys = a.scratch;
  float* const values = keys + kBlock * dim;
  float* const lanes = values + kBlock * dim; // of a group: queries, results, maxima, sums
  const auto group_at = [&](int64_t first) {
    float* query = lanes + first / kLaneQueries * (2 * size + 2 * kLaneQueries);
    LaneQueries q{query, query + size, query + 2 * size, query + 2 * size + kLaneQueries, {}};
    for (int64_t i = 0; i < kLaneQueries; ++i) // those that do not exist are like the last
      q.limits[i] = int32_t(a.first + std::min(first + i, queries - 1) / a.heads + 1);
    return q;
  };
  const auto rows_from = [&](int64_t first) {
    return [&a, first, dim](int64_t q) {
      return a.queries + (first + q) / a.heads * a.stride + (first + q) % a.heads * dim;
    };
  };
  for (int64_t g = 0; g < queries; g += kLaneQueries) {
    const LaneQueries q = group_at(g);
    queries_to_lanes(rows_from(g), std::min<int64_t>(kLaneQueries, queries - g), dim, a.scale,
                     const_cast<float*>(q.query));
    std::fill(q.out, q.out + size, 0.0f);
    std::fill(q.largest, q.largest + kLaneQueries, -std::numeric_limits<float>::infinity());
    std::fill(q.sums, q.sums + kLaneQueries, 0.0f);
  }
  for (int64_t first = 0; first < end; first += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, end - first);
    widen_rows(static_cast<const T*>(a.key_block(a.context, first / kBlock)), count, dim, keys);
    widen_rows(static_cast<const T*>(a.value_block(a.context, first / kBlock)), count, dim, values);
    for (int64_t g = 0; g < queries; g += kLaneQueries) {
      LaneQueries q = group_at(g);
      if (q.limits[kLaneQueries - 1] > first) // later queries see more
        attend_lanes(q, keys, values, dim, first, count);
    }
  }
  for (int64_t g = 0; g < queries; g += kLaneQueries) {
    const LaneQueries q = group_at(g);
    lanes_to_rows(q.out, q.sums, std::min<int64_t>(kLaneQueries, queries - g), dim, rows_from(g));
  }
}

void attention_rows(const AttentionRows& a) {
  with_type(a.dtype, [&]<typename T>() { attend_rows<T>(a); });
}

} // namespace
} // namespace q4metal::cpu
