// Rows of x as integers for byte tiles (amx_rows.h).
#pragma once

#include <vector>

#include "amx_vector.h"
#include "prefetch.h"

namespace q4metal::cpu {
namespace {

// Prepared x: per unit an A tile, [plane][row][64 k in byte_order], the high plane first; then sx
// and float(sum of x16) * sx of groups and rows; zeros behind the last group's sums.
struct PreparedRows {
  std::byte* planes;
  float* scales; // [group][row]
  float* sums;   // [group / 16][row][16]

  PreparedRows(const PackedMatrix& w, int64_t rows, int plane_count, std::byte* prepared)
      : planes(prepared), unit_bytes_(plane_count * rows * kUnit) {
    sums = reinterpret_cast<float*>(prepared + units_of(w) * unit_bytes_);
    scales = sums + sums_of(w) * rows;
  }

  static size_t bytes(const PackedMatrix& w, int64_t rows, int plane_count) {
    return rows * (units_of(w) * plane_count * kUnit + (sums_of(w) + w.groups()) * sizeof(float));
  }

  static int64_t sums_of(const PackedMatrix& w) {
    return (w.groups() + kLanes - 1) / kLanes * kLanes;
  }

  std::byte* unit(int64_t u) const { return planes + u * unit_bytes_; }
  int64_t unit_bytes() const { return unit_bytes_; }

private:
  int64_t unit_bytes_;
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

// The integers of one unit as planes in byte_order.
template <int kBits, int kGroup, int kPlanes>
Q4_INLINE void store_planes(const __m512i* v, std::byte* to, int64_t plane_bytes) {
  // packs works within 128-bit parts: byte 16p + 4i + j of the result is v[i] lane 4p + j.
  alignas(64) static constexpr auto kOrder = table_of<uint8_t, 64>([](int position) {
    const int k = byte_order<kBits, kGroup>(position);
    return k % 16 / 4 * 16 + k / 16 * 4 + k % 4;
  });
  const __m512i order = constant(kOrder);
  const auto store = [&](__m512i a, __m512i b) __attribute__((always_inline)) {
    _mm512_store_si512(to, _mm512_permutexvar_epi8(order, _mm512_packs_epi16(a, b)));
    to += plane_bytes;
  };
  __m512i a = _mm512_packs_epi32(v[0], v[1]), b = _mm512_packs_epi32(v[2], v[3]);
  if constexpr (kPlanes == 2) {
    const __m512i half = _mm512_set1_epi16(128);
    const __m512i a_high = _mm512_srai_epi16(_mm512_add_epi16(a, half), 8);
    const __m512i b_high = _mm512_srai_epi16(_mm512_add_epi16(b, half), 8);
    store(a_high, b_high);
    a = _mm512_sub_epi16(a, _mm512_slli_epi16(a_high, 8));
    b = _mm512_sub_epi16(b, _mm512_slli_epi16(b_high, 8));
  }
  store(a, b);
}

template <int kBits, int kGroup, Precision kPrecision>
void prepare_row(const float* x, int64_t columns, int64_t rows, int64_t m, const PreparedRows& to) {
  constexpr SplitFormat kFormat = split_format(kPrecision, kGroup);
  constexpr int kPlanes = kPrecision == Precision::int8 ? 1 : 2;
  float *scales = to.scales + m, *sums = to.sums + m * kLanes;
  int64_t group = 0;
  std::byte* planes = to.planes + m * kUnit;
  SplitScale scale[2] = {}; // of the halves of a unit
  __m512i group_sum = _mm512_setzero_si512();
  for (int64_t first = 0; first < columns; first += kUnit) {
    const int count = int(std::min<int64_t>(kUnit, columns - first));
    for (int half = 0; half < 2; ++half) {
      const int64_t k = first + half * kStep;
      if (k % kFormat.block == 0 && k < columns)
        scale[half] = split_scale(
            largest_magnitude(x + k, std::min<int64_t>(kFormat.block, columns - k)), kFormat.range);
      else if (k < columns)
        scale[half] = scale[1 - half]; // the block goes on
    }
    __m512i v[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (16 * i < count)
        v[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + first + 16 * i),
                                                _mm512_set1_ps(scale[i / 2].inverse)));
    store_planes<kBits, kGroup, kPlanes>(v, planes, rows * kUnit);
    planes += kPlanes * rows * kUnit;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t end = first + (half + 1) * kStep;
      group_sum = _mm512_add_epi32(group_sum, _mm512_add_epi32(v[2 * half], v[2 * half + 1]));
      if (end % kGroup != 0 || end > columns)
        continue;
      *scales = scale[half].scale;
      *sums = float(_mm512_reduce_add_epi32(group_sum)) * scale[half].scale;
      group_sum = _mm512_setzero_si512();
      scales += rows;
      sums += ++group % kLanes == 0 ? (rows - 1) * kLanes + 1 : 1;
    }
  }
}

#else

template <int kBits, int kGroup, Precision kPrecision>
void prepare_row(const float* x, int64_t columns, int64_t rows, int64_t m, const PreparedRows& to) {
  constexpr SplitFormat kFormat = split_format(kPrecision, kGroup);
  constexpr int kPlanes = kPrecision == Precision::int8 ? 1 : 2;
  const int64_t groups = columns / kGroup, units = (columns + kUnit - 1) / kUnit;
  std::vector<int16_t> codes(units * kUnit);
  std::vector<float> blocks(groups), sums(groups);
  split_row(x, columns, kGroup, kFormat, codes.data(), blocks.data(), sums.data());
  for (int64_t g = 0; g < groups; ++g) {
    to.scales[g * rows + m] = blocks[g * kGroup / kFormat.block];
    to.sums[(g / kLanes * rows + m) * kLanes + g % kLanes] = sums[g];
  }
  for (int64_t i = 0; i < units * kUnit; ++i) {
    const int position = int(i % kUnit);
    const int code = codes[i - position + byte_order<kBits, kGroup>(position)];
    const int high = kPlanes == 2 ? (code + 128) >> 8 : 0;
    std::byte* row = to.unit(i / kUnit) + m * kUnit + position;
    if (kPlanes == 2)
      *row = std::byte(high);
    row[(kPlanes - 1) * rows * kUnit] = std::byte(code - 256 * high);
  }
}

#endif

template <int kBits, int kGroup, Precision kPrecision>
void prepare_rows(const PackedMatrix& w, const float* x, int64_t rows, const PreparedRows& to) {
  std::fill(to.sums, to.scales, 0.0f);
  for (int64_t m = 0; m < rows; ++m)
    prepare_row<kBits, kGroup, kPrecision>(x + m * w.in_features, w.in_features, rows, m, to);
}

} // namespace
} // namespace q4metal::cpu
