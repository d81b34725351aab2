// 6 to 8 rows of x through byte tiles, for the fast precision, in the canonical order of split.h:
// the same bits as every other fast matvec.
//
// A: 16 output features x 64 codes (unsigned bytes). B: 64 k x 16 columns (signed bytes), the high
// plane of eight rows of x and their low plane: x16 = 256 * high + low. So one instruction gives
// the sums of one group (half of one at group size 128) for 16 features and eight rows. The tile of
// sums then joins the running sums of lane g mod 16, for each feature and row.
//
// Sixteen groups make a chunk: its codes are unpacked row by row, each a sequential read, to memory
// in the cache; then its groups are multiplied, while the next chunk is fetched.
#pragma once

#include <vector>

#include "amx_vector.h"

namespace q4metal::cpu {
namespace {

// Tiles take the same time for any number of rows: on a Xeon (Sapphire Rapids, two threads, K =
// 3584) 8 to 10 GB/s of weights, vectors 17, 14, 11, 9 and 7 at 3, 4, 5, 6 and 8 rows.
constexpr int64_t kFewestTileRows = 6;
constexpr int kRows = int(kMaxMatvecRows);
constexpr int kFeatures = 16;            // of a tile
constexpr int kSums = kFeatures * kRows; // of a tile, planes joined
constexpr int kUnitPlanes = kTileBytes;  // prepared bytes a unit

// Prepared x: per unit a B tile, then per group and row sx and float(sum of x16) * sx; missing rows
// are zeros. At group size 32 a unit's tile is two of half the height, one for each group.
struct PreparedRows {
  std::byte* planes;
  float* scales; // [group][row]
  float* sums;   // [group][row]

  PreparedRows(const PackedMatrix& w, std::byte* prepared)
      : planes(prepared), scales(reinterpret_cast<float*>(prepared + units_of(w) * kUnitPlanes)),
        sums(scales + w.groups() * kRows) {}

  static size_t bytes(const PackedMatrix& w) {
    return units_of(w) * kUnitPlanes + w.groups() * kRows * 2 * sizeof(float);
  }
};

#if Q4_AMX_AVX512

// By comparison of bits, as split_scale wants it; count is a multiple of 32.
inline float largest_magnitude(const float* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += kLanes)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + k)));
  return std::bit_cast<float>(_mm512_reduce_max_epi32(largest));
}

// Scales of one row. Its `sums` get the inverse scales: they stay there until round_unit needs
// them.
inline void prepare_scales(const PackedMatrix& w, const float* x, SplitFormat format, float* scales,
                           float* sums) {
  for (int64_t first = 0; first < w.in_features; first += format.block) {
    const int64_t last = std::min(first + format.block, w.in_features);
    const SplitScale s = split_scale(largest_magnitude(x + first, last - first), format.range);
    for (int64_t k = first; k < last; k += w.group_size) {
      scales[k / w.group_size * kRows] = s.scale;
      sums[k / w.group_size * kRows] = s.inverse;
    }
  }
}

// Rounds `count` x to integers, zeros after them, and returns both planes in byte_order.
template <int kBits, int kGroup>
Q4_INLINE void round_unit(const float* x, int count, const float* inverse0, const float* inverse1,
                          int32_t* sum0, int32_t* sum1, __m512i* high, __m512i* low) {
  __m512i v[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    if (16 * i < count)
      v[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i),
                                              _mm512_set1_ps(i < 2 ? *inverse0 : *inverse1)));
  *sum0 += _mm512_reduce_add_epi32(_mm512_add_epi32(v[0], v[1]));
  *sum1 += _mm512_reduce_add_epi32(_mm512_add_epi32(v[2], v[3]));
  // packs works within 128-bit parts: byte 16p + 4i + j of the result is v[i] lane 4p + j.
  alignas(64) static constexpr auto kOrder = table_of<uint8_t, 64>([](int position) {
    const int k = byte_order<kBits, kGroup>(position);
    return k % 16 / 4 * 16 + k / 16 * 4 + k % 4;
  });
  const __m512i a = _mm512_packs_epi32(v[0], v[1]), b = _mm512_packs_epi32(v[2], v[3]);
  const __m512i half = _mm512_set1_epi16(128);
  const __m512i a_high = _mm512_srai_epi16(_mm512_add_epi16(a, half), 8);
  const __m512i b_high = _mm512_srai_epi16(_mm512_add_epi16(b, half), 8);
  const __m512i a_low = _mm512_sub_epi16(a, _mm512_slli_epi16(a_high, 8));
  const __m512i b_low = _mm512_sub_epi16(b, _mm512_slli_epi16(b_high, 8));
  const __m512i order = constant(kOrder);
  *high = _mm512_permutexvar_epi8(order, _mm512_packs_epi16(a_high, b_high));
  *low = _mm512_permutexvar_epi8(order, _mm512_packs_epi16(a_low, b_low));
}

template <int kBits, int kGroup>
void prepare_planes(const PackedMatrix& w, const float* x, int64_t rows, SplitFormat format,
                    const PreparedRows& to) {
  std::memset(to.scales, 0, w.groups() * kRows * 2 * sizeof(float));
  for (int64_t m = 0; m < rows; ++m)
    prepare_scales(w, x + m * w.in_features, format, to.scales + m, to.sums + m);
  int32_t sums[kRows] = {};
  for (int64_t u = 0; u < units_of(w); ++u) {
    const int count = int(std::min<int64_t>(kUnit, w.in_features - u * kUnit));
    const int64_t g = u * kUnit / kGroup;
    const bool second = kGroup == 32 && count == kUnit; // group g + 1 is in this unit
    __m512i planes[2 * kRows] = {};
    for (int64_t m = 0; m < rows; ++m) {
      float* at = to.sums + g * kRows + m;
      int32_t other = 0;
      round_unit<kBits, kGroup>(x + m * w.in_features + u * kUnit, count, at,
                                second ? at + kRows : at, &sums[m],
                                kGroup == 32 ? &other : &sums[m], &planes[m], &planes[kRows + m]);
      const float* scale = to.scales + g * kRows + m;
      if ((u + 1) * kUnit % kGroup == 0) {
        at[0] = float(sums[m]) * scale[0];
        sums[m] = 0;
      }
      if (second)
        at[kRows] = float(other) * scale[kRows];
    }
    transpose(planes);
    for (int i = 0; i < 16; ++i)
      _mm512_store_si512(to.planes + u * kUnitPlanes + i * kTileRowBytes, planes[i]);
  }
}

// a in the lower eight lanes, b in the upper ones.
Q4_INLINE __m512 pair_of(const float* a, const float* b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_broadcast_ss(a)), _mm256_broadcast_ss(b),
                            1);
}

Q4_INLINE __m512i pair_of(const int32_t* a, const int32_t* b) {
  const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(a));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                            _mm256_load_si256(reinterpret_cast<const __m256i*>(b)), 1);
}

// Adds the products of one group to the sums of its lane, [feature][row], and biases times sums of
// x to the offsets. `scales` and `biases` have a row of kLanes groups a feature.
Q4_INLINE void add_group(const int32_t* products, const float* scales, const float* biases,
                         const float* x_scales, const float* x_sums, float* sums, float* offsets) {
  const __m512 sx = _mm512_broadcast_f32x8(_mm256_loadu_ps(x_scales));
  const __m512 x_sum = _mm512_broadcast_f32x8(_mm256_loadu_ps(x_sums));
#pragma GCC unroll 8
  for (int f = 0; f < kFeatures; f += 2) { // two features a vector
    const int32_t* p = products + 16 * f;
    const __m512i high = pair_of(p, p + 16), low = pair_of(p + 8, p + 24);
    const __m512 t = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    const __m512 scale = pair_of(scales + f * kLanes, scales + (f + 1) * kLanes);
    const __m512 bias = pair_of(biases + f * kLanes, biases + (f + 1) * kLanes);
    float* sum = sums + f * kRows;
    float* offset = offsets + f * kRows;
    _mm512_store_ps(sum, _mm512_fmadd_ps(t, _mm512_mul_ps(scale, sx), _mm512_load_ps(sum)));
    _mm512_store_ps(offset, _mm512_fmadd_ps(bias, x_sum, _mm512_load_ps(offset)));
  }
}

// split_tree of lanes `stride` floats apart, for 16 at a time.
Q4_INLINE __m512 tree_of(const float* lanes, int64_t stride) {
  __m512 v[kSplitLanes / 2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] =
        _mm512_add_ps(_mm512_load_ps(lanes + i * stride), _mm512_load_ps(lanes + (i + 8) * stride));
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      v[i] = _mm512_add_ps(v[i], v[i + width]);
  return v[0];
}

inline void join_lanes(const float* sums, const float* offsets, float* y) {
  for (int i = 0; i < kSums; i += 16)
    _mm512_store_ps(y + i, _mm512_add_ps(tree_of(sums + i, kSums), tree_of(offsets + i, kSums)));
}

#else

template <int kBits, int kGroup>
void prepare_planes(const PackedMatrix& w, const float* x, int64_t rows, SplitFormat format,
                    const PreparedRows& to) {
  const int64_t units = units_of(w), groups = w.groups();
  std::memset(to.planes, 0, PreparedRows::bytes(w));
  std::vector<int16_t> codes(units * kUnit);
  std::vector<float> blocks(groups), sums(groups);
  for (int64_t m = 0; m < rows; ++m) {
    split_row(x + m * w.in_features, w.in_features, kGroup, format, codes.data(), blocks.data(),
              sums.data());
    for (int64_t g = 0; g < groups; ++g) {
      to.scales[g * kRows + m] = blocks[g * kGroup / format.block];
      to.sums[g * kRows + m] = sums[g];
    }
    for (int64_t i = 0; i < units * kUnit; ++i) {
      const int position = int(i % kUnit);
      const int code = codes[i - position + byte_order<kBits, kGroup>(position)];
      const int high = (code + 128) >> 8;
      std::byte* column = to.planes + i / 4 * kTileRowBytes + i % 4;
      column[4 * m] = std::byte(high);
      column[4 * (kRows + m)] = std::byte(code - 256 * high);
    }
  }
}

inline void add_group(const int32_t* products, const float* scales, const float* biases,
                      const float* x_scales, const float* x_sums, float* sums, float* offsets) {
  for (int f = 0; f < kFeatures; ++f)
    for (int m = 0; m < kRows; ++m) {
      const int32_t t = 256 * products[16 * f + m] + products[16 * f + kRows + m];
      float& sum = sums[f * kRows + m];
      float& offset = offsets[f * kRows + m];
      sum = std::fma(float(t), scales[f * kLanes] * x_scales[m], sum);
      offset = std::fma(biases[f * kLanes], x_sums[m], offset);
    }
}

inline void join_lanes(const float* sums, const float* offsets, float* y) {
  for (int i = 0; i < kSums; ++i) {
    float lanes[2][kSplitLanes];
    for (int lane = 0; lane < kSplitLanes; ++lane) {
      lanes[0][lane] = sums[lane * kSums + i];
      lanes[1][lane] = offsets[lane * kSums + i];
    }
    y[i] = split_tree(lanes[0]) + split_tree(lanes[1]);
  }
}

#endif

// What a block of 16 features needs beside W and x.
template <int kGroup> struct RowsScratch {
  static constexpr int kChunkUnits = kLanes * kGroup / kUnit;

  alignas(64) uint8_t codes[kChunkUnits][kTileBytes];
  alignas(64) int32_t products[2][16 * 16];
  alignas(64) float scales[kFeatures][kLanes];
  alignas(64) float biases[kFeatures][kLanes];
  alignas(64) float sums[kLanes][kSums];
  alignas(64) float offsets[kLanes][kSums];
  alignas(64) float y[kSums];
};

template <int kBits, int kGroup> class TileRows {
public:
  TileRows(const PackedMatrix& w, const std::byte* prepared, int64_t rows)
      : w_(w), x_(w, const_cast<std::byte*>(prepared)), rows_(rows), tiles_(shapes()) {}

  // Output features [n, n + 16) or up to `end`.
  void run(int64_t n, int64_t end, float* y) {
    const int count = int(std::min<int64_t>(kFeatures, end - n));
    if (count < kFeatures) // the tiles' other rows give results that nobody reads
      std::memset(&s_, 0, sizeof s_);
    std::memset(s_.sums, 0, sizeof s_.sums);
    std::memset(s_.offsets, 0, sizeof s_.offsets);
    for (int64_t g = 0; g < w_.groups(); g += kLanes) {
      const int groups = int(std::min<int64_t>(kLanes, w_.groups() - g));
      unpack(n, count, g, groups);
      multiply(n, g, groups);
    }
    join_lanes(s_.sums[0], s_.offsets[0], s_.y);
    for (int64_t m = 0; m < rows_; ++m)
      for (int f = 0; f < count; ++f)
        y[m * w_.out_features + n + f] = s_.y[f * kRows + m];
  }

private:
  // Tiles 0 and 1: products; 2 and 3: codes; 4 and 5: x. Two sets, for neighbouring groups.
  static TileShapes shapes() {
    constexpr int kDepth = std::min(kGroup, kUnit);
    TileShapes shapes;
    for (int set = 0; set < 2; ++set) {
      shapes.set(set, kFeatures, kTileRowBytes);
      shapes.set(2 + set, kFeatures, kDepth);
      shapes.set(4 + set, kDepth / 4, kTileRowBytes);
    }
    return shapes;
  }

  Q4_INLINE void unpack(int64_t n, int count, int64_t g, int groups) {
    const int64_t first = g * kGroup, codes = groups * kGroup;
    for (int f = 0; f < count; ++f) {
      const uint8_t* row = w_.weight + (n + f) * w_.row_stride() + first * kBits / 8;
      uint8_t* to = s_.codes[0] + f * kTileRowBytes;
      int64_t k = 0;
      for (; k + kUnit <= codes; k += kUnit, row += unit_bytes(kBits), to += kTileBytes)
        unpack_unit<kBits, kGroup>(row, kUnit, to);
      if (kGroup == 32 && k < codes)
        unpack_unit<kBits, kGroup>(row, kStep, to);
      const int64_t at = (n + f) * w_.groups() + g;
      widen_groups(w_.scales, w_.scales_dtype, at, groups, s_.scales[f]);
      widen_groups(w_.biases, w_.scales_dtype, at, groups, s_.biases[f]);
    }
  }

  Q4_INLINE void multiply(int64_t n, int64_t g, int groups) {
    // The rows of the next chunk, or of the next features.
    const bool last = g + kLanes >= w_.groups();
    const int64_t next_n = last ? n + kFeatures : n, next_g = last ? 0 : g + kLanes;
    int fetched = 0;
    for (int i = 0; i < groups; ++i) {
      if (i % 2 == 0)
        multiply_group<0>(g, i);
      else
        multiply_group<1>(g, i);
      for (const int until = (i + 1) * kFeatures / groups; fetched < until; ++fetched)
        fetch(next_n + fetched, next_g);
      if (i > 0)
        add(g, i - 1);
    }
    add(g, groups - 1);
  }

  template <int kSet> Q4_INLINE void multiply_group(int64_t g, int i) {
    const int unit = i * kGroup / kUnit, half = i * kGroup % kUnit;
    const uint8_t* codes = s_.codes[unit] + half; // only group size 32 has halves
    const std::byte* x =
        x_.planes + (g * kGroup / kUnit + unit) * kUnitPlanes + half / 4 * kTileRowBytes;
    tiles_.template zero<kSet>();
    tiles_.template load<2 + kSet>(codes);
    tiles_.template load<4 + kSet>(x);
    tiles_.template dot_bytes<kSet, 2 + kSet, 4 + kSet>();
    if constexpr (kGroup == 128) {
      tiles_.template load<2 + kSet>(codes + kTileBytes);
      tiles_.template load<4 + kSet>(x + kUnitPlanes);
      tiles_.template dot_bytes<kSet, 2 + kSet, 4 + kSet>();
    }
    tiles_.template store<kSet>(s_.products[kSet]);
  }

  Q4_INLINE void add(int64_t g, int i) {
    const int64_t at = (g + i) * kRows;
    add_group(s_.products[i % 2], s_.scales[0] + i, s_.biases[0] + i, x_.scales + at, x_.sums + at,
              s_.sums[i], s_.offsets[i]);
  }

  Q4_INLINE void fetch(int64_t n, int64_t g) const {
    constexpr int kBytes = kLanes * kGroup * kBits / 8;
    const uint8_t* row = w_.weight + n * w_.row_stride() + g * kGroup * kBits / 8;
    for (int b = 0; b < kBytes; b += 64)
      __builtin_prefetch(row + b);
    const int64_t at = (n * w_.groups() + g) * size_of(w_.scales_dtype);
    __builtin_prefetch(static_cast<const std::byte*>(w_.scales) + at);
    __builtin_prefetch(static_cast<const std::byte*>(w_.biases) + at);
  }

  const PackedMatrix& w_;
  const PreparedRows x_;
  const int64_t rows_;
  Tiles tiles_;
  RowsScratch<kGroup> s_;
};

inline size_t tile_rows_bytes(const PackedMatrix& w, int64_t) { return PreparedRows::bytes(w); }

inline void prepare_tile_rows(const PackedMatrix& w, const float* x, int64_t rows,
                              std::byte* prepared) {
  for_format(w, [&]<int kBits, int kGroup>() {
    prepare_planes<kBits, kGroup>(w, x, rows, split_format(Precision::fast, kGroup),
                                  PreparedRows(w, prepared));
  });
}

inline void run_tile_rows(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                          int64_t begin, int64_t end) {
  for_format(w, [&]<int kBits, int kGroup>() {
    TileRows<kBits, kGroup> kernel(w, prepared, rows);
    for (int64_t n = begin; n < end; n += kFeatures)
      kernel.run(n, end, y);
  });
}

} // namespace
} // namespace q4metal::cpu
