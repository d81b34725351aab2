// Attention of a prompt's rows through bfloat16 tiles, for fast and int8: each factor as the sum of
// two bfloat16, high + low, and three of the four products of such sums, so that about 16 bits of
// it count. Softmax is in float32.
//
// Sixteen queries are the columns of every tile of sums: scores are [key][query], results
// [dim][query]. So maxima, sums and weights need nothing across lanes, and weights become the next
// product's operand as they are. Pairs of k that share a dword of a tile's row are 16 apart.
#pragma once

#include <limits>
#include <type_traits>
#include <utility>

#include "amx_vector.h"
#include "exponential.h"

namespace q4metal::cpu {
namespace {

typedef float Lanes __attribute__((vector_size(64), aligned(64)));
typedef uint32_t LaneBits __attribute__((vector_size(64), aligned(64)));
typedef int32_t LaneInts __attribute__((vector_size(64), aligned(64)));

constexpr int kBlockKeys = AttentionSplit::kBlockPositions; // two tiles of keys
constexpr int kTileDims = 32;                               // that a tile of keys or queries has
constexpr int64_t kTileDwords = kTileBytes / 4;

// Tiles of the high and of the low parts, one after the other.
struct Parts {
  uint32_t high[kTileDwords], low[kTileDwords];
};
static_assert(sizeof(Parts) == 2 * kTileBytes);

#if Q4_AMX_AVX512

Q4_INLINE void transpose_dwords(LaneBits* v) { transpose(reinterpret_cast<__m512i*>(v)); }

template <typename T> Q4_INLINE Lanes widen_lanes(const T* p) {
  if constexpr (std::is_same_v<T, float>)
    return (Lanes)_mm512_loadu_ps(p);
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (std::is_same_v<T, Half>)
    return (Lanes)_mm512_cvtph_ps(v);
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
}

Q4_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

Q4_INLINE bool all_are(Lanes v, float value) {
  return _mm512_cmpneq_ps_mask((__m512)v, _mm512_set1_ps(value)) == 0;
}

#else

Q4_INLINE void transpose_dwords(LaneBits* v) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t element = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = element;
    }
}

template <typename T> Q4_INLINE Lanes widen_lanes(const T* p) {
  Lanes wide;
  for (int i = 0; i < kLanes; ++i)
    wide[i] = widen(p[i]);
  return wide;
}

Q4_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < kLanes; ++i)
    c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}

Q4_INLINE bool all_are(Lanes v, float value) {
  bool all = true;
  for (int i = 0; i < kLanes; ++i)
    all &= v[i] == value;
  return all;
}

#endif

Q4_INLINE Lanes exp_lanes(Lanes x) {
  return exponential<Lanes, LaneInts>(x, [](Lanes a, Lanes b, Lanes c) __attribute__((
                                             always_inline)) { return multiply_add(a, b, c); });
}

// Two vectors as pairs of bfloat16, `a` in the lower halves: the nearest ones and, of what is left
// of each, the upper 16 bits. A NaN stays one in `low`.
Q4_INLINE void split_pairs(Lanes a, Lanes b, LaneBits& high, LaneBits& low) {
  const LaneBits upper = LaneBits{} + 0xffff0000u;
  const LaneBits a_high = ((LaneBits)a + 0x8000u) & upper;
  const LaneBits b_high = ((LaneBits)b + 0x8000u) & upper;
  high = a_high >> 16 | b_high;
  low = (LaneBits)(a - (Lanes)a_high) >> 16 | ((LaneBits)(b - (Lanes)b_high) & upper);
}

Q4_INLINE LaneBits& lanes_at(uint32_t* dwords, int64_t row) {
  return *reinterpret_cast<LaneBits*>(dwords + row * kLanes);
}
Q4_INLINE Lanes& lanes_at(float* values, int64_t row) {
  return *reinterpret_cast<Lanes*>(values + row * kLanes);
}

// Keys [count, dim] as A tiles [dim / 32][key / 16], zeros behind the last.
template <typename T> void pack_keys(const T* keys, int64_t dim, int64_t count, Parts* to) {
  for (int64_t d = 0; d < dim; d += kTileDims)
    for (int64_t p = 0; p < kBlockKeys; ++p) {
      LaneBits high = {}, low = {};
      if (p < count)
        split_pairs(widen_lanes(keys + p * dim + d), widen_lanes(keys + p * dim + d + kLanes), high,
                    low);
      Parts& parts = to[d / kTileDims * 2 + p / kTileRows];
      lanes_at(parts.high, p % kTileRows) = high;
      lanes_at(parts.low, p % kTileRows) = low;
    }
}

// Values [count, dim] as A tiles [dim / 16] whose k are positions, zeros behind the last.
template <typename T> void pack_values(const T* values, int64_t dim, int64_t count, Parts* to) {
  const auto row = [&](int64_t p, int64_t d) __attribute__((always_inline)) {
    return p < count ? widen_lanes(values + p * dim + d) : Lanes{};
  };
  for (int64_t d = 0; d < dim; d += kLanes, ++to) {
    LaneBits high[kLanes], low[kLanes];
    for (int i = 0; i < kLanes; ++i)
      split_pairs(row(i, d), row(kLanes + i, d), high[i], low[i]);
    transpose_dwords(high);
    transpose_dwords(low);
    for (int i = 0; i < kLanes; ++i) {
      lanes_at(to->high, i) = high[i];
      lanes_at(to->low, i) = low[i];
    }
  }
}

// The queries of a tile, as B tiles [dim / 32].
inline void pack_queries(const float* const* queries, int64_t dim, Parts* to) {
  for (int64_t d = 0; d < dim; d += kTileDims, ++to) {
    LaneBits high[kLanes], low[kLanes];
    for (int i = 0; i < kLanes; ++i)
      split_pairs(widen_lanes(queries[i] + d), widen_lanes(queries[i] + d + kLanes), high[i],
                  low[i]);
    transpose_dwords(high);
    transpose_dwords(low);
    for (int i = 0; i < kLanes; ++i) {
      lanes_at(to->high, i) = high[i];
      lanes_at(to->low, i) = low[i];
    }
  }
}

// Sixteen queries under way.
struct QueryTile {
  Parts* packed;
  float* results; // [dim][query], then the maximum of all scores and the weights' sum
  LaneInts positions;
};

// One block of keys and values for a tile of queries.
class TileAttention {
public:
  TileAttention(int64_t dim, float scale) : dim_(dim), scale_(scale), tiles_(shapes()) {}

  void attend(const Parts* keys, const Parts* values, int64_t first, QueryTile& q) {
    score(keys, q.packed);
    if (q.positions[0] + 1 >= first + kBlockKeys) // so do the later queries
      soften<false>(first, q);
    else
      soften<true>(first, q);
    weigh(values, q.results);
  }

private:
  static TileShapes shapes() {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile)
      shapes.set(tile, kTileRows, kTileRowBytes);
    return shapes;
  }

  template <int kC, int kA, int kB> Q4_INLINE void multiply_parts() {
    tiles_.template dot_bf16<kC, kA, kB>();
    tiles_.template dot_bf16<kC, kA, kB + 1>();
    tiles_.template dot_bf16<kC, kA + 1, kB>();
  }

  template <int kTile> Q4_INLINE void load_parts(const Parts& parts) {
    tiles_.template load<kTile>(parts.high);
    tiles_.template load<kTile + 1>(parts.low);
  }

  void score(const Parts* keys, const Parts* queries) {
    tiles_.zero<0>();
    tiles_.zero<1>();
    for (int64_t d = 0; d < dim_; d += kTileDims, keys += 2, ++queries) {
      load_parts<2>(*queries);
      load_parts<4>(keys[0]);
      multiply_parts<0, 4, 2>();
      load_parts<6>(keys[1]);
      multiply_parts<1, 6, 2>();
    }
    tiles_.store<0>(scores_);
    tiles_.store<1>(scores_ + kTileDwords);
  }

  // Scores become weights e^(score - maximum), those of later positions zero.
  template <bool kMasked> void soften(int64_t first, QueryTile& q) {
    const LaneInts counts = q.positions + 1 - int32_t(first); // of keys that a query sees
    Lanes &old_maximum = lanes_at(q.results, dim_), &sum = lanes_at(q.results, dim_ + 1);
    Lanes maximum = old_maximum;
    for (int p = 0; p < kBlockKeys; ++p) {
      Lanes& score = lanes_at(scores_, p);
      score *= scale_;
      if (kMasked)
        score = counts > p ? score : Lanes{} - std::numeric_limits<float>::infinity();
      maximum = score > maximum ? score : maximum;
    }
    // Where nothing came before, e^-87 instead of 0: it meets zeros only.
    const Lanes rescale = exp_lanes(old_maximum - maximum);
    const auto weight = [&](int p) __attribute__((always_inline)) {
      const Lanes e = exp_lanes(lanes_at(scores_, p) - maximum);
      if (kMasked)
        return counts > p ? e : Lanes{};
      return e;
    };
    Lanes sums[2] = {};
    for (int p = 0; p < kLanes; ++p) {
      const Lanes a = weight(p), b = weight(kLanes + p);
      sums[0] += a;
      sums[1] += b;
      split_pairs(a, b, lanes_at(weights_.high, p), lanes_at(weights_.low, p));
    }
    sum = sum * rescale + (sums[0] + sums[1]);
    old_maximum = maximum;
    if (!all_are(rescale, 1.0f))
      for (int64_t d = 0; d < dim_; ++d)
        lanes_at(q.results, d) *= rescale;
  }

  void weigh(const Parts* values, float* results) {
    load_parts<2>(weights_);
    for (int64_t d = 0; d < dim_; d += kTileRows, ++values, results += kTileDwords) {
      tiles_.load<0>(results);
      load_parts<4>(*values);
      multiply_parts<0, 4, 2>();
      tiles_.store<0>(results);
    }
  }

  const int64_t dim_;
  const float scale_;
  Tiles tiles_;
  alignas(64) float scores_[2 * kTileDwords]; // [key][query]
  alignas(64) Parts weights_;
};

// Heads whose size is no multiple of kTileDims go to vectors.
void (*vector_attention_rows)(const AttentionRows&);

template <typename T> void attend_tiles(const AttentionRows& a) {
  const int64_t dim = a.head_dim, queries = a.rows * a.heads;
  const int64_t tiles = (queries + kLanes - 1) / kLanes;
  auto* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(a.scratch) + 63) / 64 * 64);
  const auto take = [&](int64_t floats) { return std::exchange(next, next + floats); };
  auto* const keys = reinterpret_cast<Parts*>(take(kBlockKeys * dim));
  auto* const values = reinterpret_cast<Parts*>(take(kBlockKeys * dim));
  auto* const packed = reinterpret_cast<Parts*>(take(tiles * kLanes * dim));
  const int64_t stride = kLanes * (dim + 2); // of results
  const auto query = [&](int64_t q) __attribute__((always_inline)) {
    return a.queries + q / a.heads * a.stride + q % a.heads * dim;
  };
  const auto tile = [&](int64_t t) __attribute__((always_inline)) {
    QueryTile tile = {packed + t * dim / kTileDims, next + t * stride, {}};
    for (int i = 0; i < kLanes; ++i) // places behind the last query repeat it
      tile.positions[i] = int32_t(a.first + std::min(t * kLanes + i, queries - 1) / a.heads);
    return tile;
  };
  for (int64_t t = 0; t < tiles; ++t) {
    const QueryTile q = tile(t);
    const float* from[kLanes];
    for (int i = 0; i < kLanes; ++i)
      from[i] = query(std::min(t * kLanes + i, queries - 1));
    pack_queries(from, dim, q.packed);
    std::fill(q.results, q.results + stride, 0.0f);
    lanes_at(q.results, dim) -= std::numeric_limits<float>::infinity();
  }
  TileAttention attention(dim, a.scale);
  for (int64_t first = 0; first < a.first + a.rows; first += kBlockKeys) {
    const int64_t count = std::min<int64_t>(kBlockKeys, a.first + a.rows - first);
    pack_keys(static_cast<const T*>(a.key_block(a.context, first / kBlockKeys)), dim, count, keys);
    pack_values(static_cast<const T*>(a.value_block(a.context, first / kBlockKeys)), dim, count,
                values);
    for (int64_t t = 0; t < tiles; ++t) {
      QueryTile q = tile(t);
      if (q.positions[kLanes - 1] >= first) // later queries see more
        attention.attend(keys, values, first, q);
    }
  }
  for (int64_t t = 0; t < tiles; ++t) {
    float* const results = tile(t).results;
    const Lanes inverse = 1.0f / lanes_at(results, dim + 1);
    for (int64_t d = 0; d < dim; d += kLanes) {
      LaneBits v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = (LaneBits)(lanes_at(results, d + i) * inverse);
      transpose_dwords(v);
      for (int64_t q = t * kLanes; q < std::min((t + 1) * kLanes, queries); ++q)
        std::memcpy(query(q) + d, &v[q - t * kLanes], sizeof v[0]);
    }
  }
}

inline void attend_rows(const AttentionRows& a) {
  if (a.head_dim % kTileDims != 0)
    return vector_attention_rows(a);
  with_type(a.dtype, [&]<typename T>() { attend_tiles<T>(a); });
}

} // namespace
} // namespace q4metal::cpu
