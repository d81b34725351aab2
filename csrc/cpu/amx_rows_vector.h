// The vector work around the byte tiles of several rows (amx_rows.h), each piece twice as in
// amx_vector.h.
#pragma once

#include "amx_vector.h"

namespace q4metal::cpu {
namespace {

#if Q4_AMX_AVX512

// 16 rows of one unit, `stride` bytes apart, as a B tile; with 4 bits two codes a byte are parted
// after the transposition.
template <int kBits, int kGroup>
Q4_INLINE void unpack_tile(const uint8_t* rows, int64_t stride, uint8_t* to) {
  const uint8_t* const fours[4] = {rows, rows + 4 * stride, rows + 8 * stride, rows + 12 * stride};
  if constexpr (kBits == 4) {
    __m512i parts[8]; // [feature % 4 + feature / 8 * 4]: that feature and the one four after it
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int64_t at = i % 4 * stride;
      const uint8_t *low = fours[i / 4 * 2] + at, *high = fours[i / 4 * 2 + 1] + at;
      parts[i] =
          _mm512_inserti64x4(_mm512_castsi256_si512(load_half(low, 32)), load_half(high, 32), 1);
    }
    __m512i pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(parts[i], parts[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(parts[i], parts[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { // quads[i + c]: dwords c and 4 + c
      quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
      quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
      quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
      quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    const __m512i mask = _mm512_set1_epi8(15);
    constexpr int kUpper = kGroup == 32 ? 4 : 8; // tile rows from lower to upper halves
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
#pragma GCC unroll 2
      for (int second = 0; second < 2; ++second) {
        const __m512i v = second ? _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xdd)
                                 : _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88);
        uint8_t* row = to + (c + second * (12 - kUpper)) * kTileRowBytes;
        _mm512_store_si512(row, _mm512_and_si512(v, mask));
        _mm512_store_si512(row + kUpper * kTileRowBytes,
                           _mm512_and_si512(_mm512_srli_epi16(v, 4), mask));
      }
  } else {
    __m512i v[16];
#pragma GCC unroll 16
    for (int f = 0; f < 16; ++f)
      v[f] = natural_bytes<kBits>(fours[f / 4] + f % 4 * stride, kUnit);
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      _mm512_store_si512(to + i * kTileRowBytes, v[i]);
  }
}

// Scales of 16 groups and as many features, a group after the other. Those of 16 bits stay so until
// they are used.
struct GroupScales {
  alignas(64) std::byte bytes[kLanes * kLanes * sizeof(float)];

  // Of `groups` groups from `index` on and of features `stride` further on each; those from
  // `features` on repeat the last.
  void load(const PackedMatrix& w, int64_t index, int64_t stride, int features, int groups) {
    w.scales_dtype == DType::f32 ? load_floats(w, index, stride, features, groups)
                                 : load_halves(w, index, stride, features, groups);
  }

  Q4_INLINE __m512 at(DType dtype, int64_t group) const {
    if (dtype == DType::f32)
      return _mm512_load_ps(bytes + group * 64);
    const __m256i v = _mm256_load_si256(
        reinterpret_cast<const __m256i*>(bytes + group % 8 * 64 + group / 8 * 32));
    return dtype == DType::f16
               ? _mm512_cvtph_ps(v)
               : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }

private:
  void load_floats(const PackedMatrix& w, int64_t index, int64_t stride, int features, int groups) {
    __m512i v[kLanes];
    for (int f = 0; f < kLanes; ++f)
      v[f] = _mm512_castps_si512(widened_groups(
          w.scales, w.scales_dtype, index + std::min(f, features - 1) * stride, groups));
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      _mm512_store_si512(bytes + i * 64, v[i]);
  }

  // Groups i and 8 + i become vector i.
  void load_halves(const PackedMatrix& w, int64_t index, int64_t stride, int features, int groups) {
    const auto* from = static_cast<const uint16_t*>(w.scales) + index;
    const __mmask16 mask = first_lanes(groups);
    const auto row = [&](int f) __attribute__((always_inline)) {
      return _mm256_maskz_loadu_epi16(mask, from + std::min(f, features - 1) * stride);
    };
    __m512i v[8], pairs[8], fours[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(row(i)), row(8 + i), 1);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) { // pairs[i], pairs[4 + i]: groups 0 to 3 and 4 to 7 of each part
      pairs[i] = _mm512_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
      pairs[4 + i] = _mm512_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) { // fours[2 * c + i]: groups 2c and 2c + 1, features 4i to 4i + 3
        const __m512i a = pairs[4 * half + 2 * i], b = pairs[4 * half + 2 * i + 1];
        fours[4 * half + i] = _mm512_unpacklo_epi32(a, b);
        fours[4 * half + 2 + i] = _mm512_unpackhi_epi32(a, b);
      }
    const __m512i order = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i even = _mm512_unpacklo_epi64(fours[2 * c], fours[2 * c + 1]);
      const __m512i odd = _mm512_unpackhi_epi64(fours[2 * c], fours[2 * c + 1]);
      _mm512_store_si512(bytes + 128 * c, _mm512_permutexvar_epi64(order, even));
      _mm512_store_si512(bytes + 128 * c + 64, _mm512_permutexvar_epi64(order, odd));
    }
  }
};

// Adds the products of one group to the sums of its lane, [row][feature].
template <int kPlanes, bool kFirst>
Q4_INLINE void add_group(const int32_t* products, const GroupScales& scales, DType dtype,
                         int64_t lane, const float* x_scales, int64_t rows, float* sums) {
  const __m512 scale = scales.at(dtype, lane);
#pragma GCC unroll 4
  for (int64_t m = 0; m < rows; ++m) {
    __m512i t = _mm512_load_si512(products + m * kLanes);
    if constexpr (kPlanes == 2)
      t = _mm512_add_epi32(_mm512_slli_epi32(t, 8),
                           _mm512_load_si512(products + (rows + m) * kLanes));
    const __m512 sum = kFirst ? _mm512_setzero_ps() : _mm512_load_ps(sums + m * kLanes);
    const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[m]));
    _mm512_store_ps(sums + m * kLanes, _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), factor, sum));
  }
}

// split_tree of lanes `stride` floats apart, for 16 features.
Q4_INLINE __m512 tree_of(const float* lanes, int64_t stride) {
  __m512 v[kSplitLanes / 2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] =
        _mm512_add_ps(_mm512_load_ps(lanes + i * stride), _mm512_load_ps(lanes + (i + 8) * stride));
#pragma GCC unroll 3
  for (int width = 4; width > 0; width /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < width; ++i)
      v[i] = _mm512_add_ps(v[i], v[i + width]);
  return v[0];
}

// split_tree of each of 16 vectors, whose lanes are those of split.h.
Q4_INLINE __m512 trees_of(const float* lanes) {
  const auto load = [&](int f) __attribute__((always_inline)) {
    return _mm512_load_ps(lanes + f * kLanes);
  };
  const auto eights = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const auto fours = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const auto twos = [](__m512 x, __m512 y) __attribute__((always_inline)) {
    const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  const auto ones = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  };
  __m512 v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    v[i] = fours(eights(load(i), load(4 + i)), eights(load(8 + i), load(12 + i)));
  return ones(twos(v[0], v[1]), twos(v[2], v[3]));
}

// Biases times sums of x of one feature, by lanes: [row][16 features][lane].
template <int kRows>
inline void add_biases(const PackedMatrix& w, int64_t index, int64_t groups, const float* x_sums,
                       float* to) {
  __m512 sums[kRows] = {};
  for (int64_t g = 0; g < groups; g += kLanes, x_sums += kRows * kLanes) {
    const __m512 bias = widened_groups(w.biases, w.scales_dtype, index + g, groups - g);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
      sums[m] = _mm512_fmadd_ps(bias, _mm512_load_ps(x_sums + m * kLanes), sums[m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
    _mm512_store_ps(to + m * kLanes * kLanes, sums[m]);
}

// `sums` are lanes `stride` floats apart, for 16 features; `offsets` is [feature][lane].
inline void join_lanes(const float* sums, int64_t stride, const float* offsets, int features,
                       float* y) {
  _mm512_mask_storeu_ps(y, first_lanes(features),
                        _mm512_add_ps(tree_of(sums, stride), trees_of(offsets)));
}

#else

template <int kBits, int kGroup>
inline void unpack_tile(const uint8_t* rows, int64_t stride, uint8_t* to) {
  for (int f = 0; f < 16; ++f) {
    uint8_t natural[kUnit];
    natural_bytes<kBits>(rows + f * stride, kUnit, natural);
    for (int i = 0; i < kUnit; ++i)
      to[i / 4 * kTileRowBytes + f * 4 + i % 4] = natural[byte_order<kBits, kGroup>(i)];
  }
}

struct GroupScales {
  float values[kLanes][kLanes];

  void load(const PackedMatrix& w, int64_t index, int64_t stride, int features, int groups) {
    for (int f = 0; f < kLanes; ++f)
      for (int i = 0; i < groups; ++i)
        values[i][f] =
            widen_at(w.scales, w.scales_dtype, index + std::min(f, features - 1) * stride + i);
  }
};

template <int kPlanes, bool kFirst>
inline void add_group(const int32_t* products, const GroupScales& scales, DType, int64_t lane,
                      const float* x_scales, int64_t rows, float* sums) {
  for (int64_t m = 0; m < rows; ++m, sums += kLanes)
    for (int f = 0; f < kLanes; ++f) {
      int32_t t = products[m * kLanes + f];
      if (kPlanes == 2)
        t = 256 * t + products[(rows + m) * kLanes + f];
      sums[f] = std::fma(float(t), scales.values[lane][f] * x_scales[m], kFirst ? 0.0f : sums[f]);
    }
}

template <int kRows>
inline void add_biases(const PackedMatrix& w, int64_t index, int64_t groups, const float* x_sums,
                       float* to) {
  for (int m = 0; m < kRows; ++m) {
    float* sums = to + m * kLanes * kLanes;
    std::fill(sums, sums + kLanes, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const float bias = widen_at(w.biases, w.scales_dtype, index + g);
      const float x_sum = x_sums[(g / kLanes * kRows + m) * kLanes + g % kLanes];
      sums[g % kLanes] = std::fma(bias, x_sum, sums[g % kLanes]);
    }
  }
}

inline void join_lanes(const float* sums, int64_t stride, const float* offsets, int features,
                       float* y) {
  for (int f = 0; f < features; ++f) {
    float lanes[kSplitLanes];
    for (int lane = 0; lane < kSplitLanes; ++lane)
      lanes[lane] = sums[lane * stride + f];
    y[f] = split_tree(lanes) + split_tree(offsets + f * kLanes);
  }
}

#endif

} // namespace
} // namespace q4metal::cpu
