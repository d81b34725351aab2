// The AVX2 integer matvec from sums of groups (avx2_turn.h) to y: scales, biases, and the canonical
// order of addition (split.h).
#pragma once

#include "avx2_split.h"

namespace q4metal::cpu {
namespace {

// The sums of one row of W and one of x; lanes as in split.h.
struct Lanes {
  __m256 acc[2], off[2];

  // Eight groups.
  Q4_INLINE void add(const int32_t* t, __m256 scale, __m256 bias, const float* x_scales,
                     const float* x_sums, int half) {
    const __m256 factor = _mm256_mul_ps(scale, _mm256_loadu_ps(x_scales));
    acc[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load(t)), factor, acc[half]);
    off[half] = _mm256_fmadd_ps(bias, _mm256_loadu_ps(x_sums), off[half]);
  }
  // Both trees at once, one in each half.
  Q4_INLINE float result() const {
    const __m256 a = _mm256_add_ps(acc[0], acc[1]), b = _mm256_add_ps(off[0], off[1]);
    const __m256 four =
        _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    const __m256 two = _mm256_add_ps(four, _mm256_permute_ps(four, 0x0e));
    const __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1)));
  }
};

// Sums of groups [group, group + groups) of some rows of W, for one or several rows of x.
struct Sums {
  const PackedMatrix& w;
  const PreparedRow& row;
  const std::byte* x;
  int64_t rows; // of x
  int64_t group, groups;
  bool is_first, is_last; // of the rows' groups

  // Adds those of row n of W to `lanes` [rows]; t [rows, stride].
  template <DType kDType, bool kSeveral>
  Q4_INLINE void add(int64_t n, const int32_t* t, int64_t stride, Lanes* lanes, float* y) const {
    const int64_t count = kSeveral ? rows : 1;
    Lanes own[kSeveral ? kMaxMatvecRows : 1];
    for (int64_t m = 0; m < count; ++m)
      own[m] = is_first ? Lanes{} : lanes[m];
    const auto eight = [&]<bool kAll>(int64_t g, int half) __attribute__((always_inline)) {
      const int64_t at = n * row.groups + group + g;
      __m256 scale, bias;
      if constexpr (kAll) {
        scale = load8(static_cast<const std::byte*>(w.scales) + at * size_of(kDType), kDType);
        bias = load8(static_cast<const std::byte*>(w.biases) + at * size_of(kDType), kDType);
      } else {
        scale = load_groups(w, w.scales, at, groups - g);
        bias = load_groups(w, w.biases, at, groups - g);
      }
      for (int64_t m = 0; m < count; ++m) {
        const std::byte* xm = x + m * row.bytes();
        own[m].add(t + m * stride + g, scale, bias, row.scales(xm) + group + g,
                   row.sums(xm) + group + g, half);
      }
    };
    int64_t g = 0;
    for (; g + 16 <= groups; g += 16) {
      eight.template operator()<true>(g, 0);
      eight.template operator()<true>(g + 8, 1);
    }
    if (g + 8 <= groups) {
      eight.template operator()<true>(g, 0);
      g += 8;
      if (g < groups)
        eight.template operator()<false>(g, 1);
    } else if (g < groups) {
      eight.template operator()<false>(g, 0);
    }
    for (int64_t m = 0; m < count; ++m)
      if (is_last)
        y[m * w.out_features + n] = own[m].result();
      else
        lanes[m] = own[m];
  }
};

// One row of x and whole rows of W: nothing is carried from tile to tile.
template <DType kDType> struct OneRow {
  const PackedMatrix& w;
  const int64_t groups, whole; // of a row, and of those in vectors of eight
  const __m256 mask;           // of the groups in the last vector
  const float *x_scales, *x_sums;

  OneRow(const PackedMatrix& matrix, const PreparedRow& row, const std::byte* x)
      : w(matrix), groups(row.groups), whole(row.groups / 8 * 8), mask(group_mask(row.groups % 8)),
        x_scales(row.scales(x)), x_sums(row.sums(x)) {}

  // Row n of W times x, t [groups].
  Q4_INLINE float result(int64_t n, const int32_t* t) const {
    constexpr int64_t kSize = size_of(kDType);
    const auto* scales = static_cast<const std::byte*>(w.scales) + n * groups * kSize;
    const auto* biases = static_cast<const std::byte*>(w.biases) + n * groups * kSize;
    Lanes lanes{};
    int64_t g = 0;
    for (; g + 16 <= whole; g += 16) {
      lanes.add(t + g, load8(scales + g * kSize, kDType), load8(biases + g * kSize, kDType),
                x_scales + g, x_sums + g, 0);
      lanes.add(t + g + 8, load8(scales + (g + 8) * kSize, kDType),
                load8(biases + (g + 8) * kSize, kDType), x_scales + g + 8, x_sums + g + 8, 1);
    }
    if (g < whole) {
      lanes.add(t + g, load8(scales + g * kSize, kDType), load8(biases + g * kSize, kDType),
                x_scales + g, x_sums + g, 0);
      g += 8;
      if (g < groups)
        rest(lanes, scales + g * kSize, biases + g * kSize, n, t, g, 1);
    } else if (g < groups) {
      rest(lanes, scales + g * kSize, biases + g * kSize, n, t, g, 0);
    }
    return lanes.result();
  }

  Q4_INLINE void rest(Lanes& lanes, const std::byte* scales, const std::byte* biases, int64_t n,
                      const int32_t* t, int64_t g, int half) const {
    __m256 scale, bias;
    if (n * groups + g + 8 <= w.out_features * groups) [[likely]] {
      scale = _mm256_and_ps(load8(scales, kDType), mask);
      bias = _mm256_and_ps(load8(biases, kDType), mask);
    } else {
      scale = load_groups(w, w.scales, n * groups + g, groups - g);
      bias = load_groups(w, w.biases, n * groups + g, groups - g);
    }
    lanes.add(t + g, scale, bias, x_scales + g, x_sums + g, half);
  }
};

} // namespace
} // namespace q4metal::cpu
