// The vector work around the tiles, each piece twice: AVX-512 where Q4_AMX_AVX512 is 1, else plain
// C++ that gives the same bits.
//
// Codes are handled in units of 64: they fill a row of a byte tile, or one row in each of two
// bfloat16 tiles ("steps" of 32). Within a unit codes lie in the order in which they are cheapest
// to unpack; x is prepared in the same order. A unit has 32 codes only at the end of a row, at
// group size 32; what is missing counts as code 0.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#if Q4_AMX_AVX512
#include <immintrin.h>
#if !defined(__clang__) // GCC 12 reports its own intrinsics' "undefined" operands
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

#include "amx_tiles.h"
#include "float_types.h"
#include "split.h"

namespace q4metal::cpu {
namespace {

constexpr int kUnit = 64, kStep = 32;
constexpr int kLanes = 16;

constexpr int64_t units_of(const PackedMatrix& w) { return (w.in_features + kUnit - 1) / kUnit; }
constexpr int unit_bytes(int bits) { return kUnit * bits / 8; }

// ---- the order of codes in a unit: position -> k

// As bytes. 4 bits: the lower halves of a group's bytes, then the upper halves.
template <int kBits, int kGroup> constexpr int byte_order(int position) {
  if (kBits != 4)
    return position;
  constexpr int kSpan = std::min(kGroup, kUnit);
  const int within = position % kSpan;
  return position - within + within % (kSpan / 2) * 2 + within / (kSpan / 2);
}

// As bfloat16. 4 bits: the first, second, third and fourth code of each of the 16 words of 16 bits.
template <int kBits> constexpr int bf16_order(int position) {
  return kBits != 4 ? position : position % 16 * 4 + position / 16;
}

#if Q4_AMX_AVX512

template <typename T, int kCount, typename F> constexpr auto table_of(F element) {
  std::array<T, kCount> table{};
  for (int i = 0; i < kCount; ++i)
    table[i] = T(element(i));
  return table;
}

// A vector of constants; the compiler hoists it out of loops.
template <typename T, size_t kCount>
Q4_INLINE __m512i constant(const std::array<T, kCount>& table) {
  static_assert(sizeof table == 64);
  return _mm512_loadu_si512(table.data());
}

Q4_INLINE __mmask16 first_lanes(int64_t count) {
  return __mmask16(0xffffu >> (16 - std::min<int64_t>(count, 16)));
}
Q4_INLINE __mmask64 first_bytes(int count) { return ~uint64_t(0) >> (64 - count); }

// v[i] lane j becomes v[j] lane i.
Q4_INLINE void transpose(__m512i* v) {
  __m512i pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) { // fours[i + c], 128-bit part p: lane 4p + c of four vectors
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    v[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    v[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    v[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    v[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
}

// ---- codes

// `bytes` bytes of packed codes, 32 at most, zeros after them.
Q4_INLINE __m256i load_half(const uint8_t* from, int bytes) {
  if (bytes == 32)
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// One unit as bytes in natural order; any width. Every eight codes are gathered into a 64-bit lane
// (they are kBits whole bytes), and each byte there takes the eight bits where its code begins.
template <int kBits> Q4_INLINE __m512i natural_bytes(const uint8_t* from, int count) {
  if constexpr (kBits == 8) {
    return count == kUnit ? _mm512_loadu_si512(from)
                          : _mm512_maskz_loadu_epi8(first_bytes(count), from);
  } else {
    alignas(64) static constexpr auto kBytes =
        table_of<uint8_t, 64>([](int i) { return i / 8 * kBits + i % 8; });
    alignas(64) static constexpr auto kBegins =
        table_of<uint8_t, 64>([](int i) { return i % 8 * kBits; });
    const __m512i packed = _mm512_maskz_loadu_epi8(first_bytes(count * kBits / 8), from);
    const __m512i eights = _mm512_permutexvar_epi8(constant(kBytes), packed);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(constant(kBegins), eights),
                            _mm512_set1_epi8((1 << kBits) - 1));
  }
}

// Scales or biases [index, index + 16) in float32, zeros from `count` on.
Q4_INLINE __m512 widened_groups(const void* values, DType dtype, int64_t index, int64_t count) {
  const auto* from = static_cast<const std::byte*>(values) + index * size_of(dtype);
  const __mmask16 mask = first_lanes(count);
  if (dtype == DType::f32)
    return _mm512_maskz_loadu_ps(mask, from);
  const __m256i narrow = _mm256_maskz_loadu_epi16(mask, from);
  return dtype == DType::f16
             ? _mm512_cvtph_ps(narrow)
             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

Q4_INLINE void widen_groups(const void* values, DType dtype, int64_t index, int64_t count,
                            float* to) {
  _mm512_store_ps(to, widened_groups(values, dtype, index, count));
}

// ---- bfloat16

// One unit dequantized and rounded, in bf16_order: 32 values to each step. `scales` and `biases`:
// those of the unit's group, or of its two at group size 32.
template <int kBits, int kGroup>
Q4_INLINE void dequantize_unit(const uint8_t* from, int count, const float* scales,
                               const float* biases, uint16_t* step0, uint16_t* step1) {
  const __m512 scale = _mm512_set1_ps(scales[0]), bias = _mm512_set1_ps(biases[0]);
  if constexpr (kBits == 4) {
    // All 16 values of a group in a table. vpermw looks at the low five bits of a word: without
    // masks for one table (twice, so that the fifth bit does not matter), with them for two.
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 values = _mm512_fmadd_ps(codes, scale, bias);
    const __m512i twice = _mm512_broadcast_i64x4(load_half(from, kGroup == 32 ? count / 2 : 32));
    alignas(64) static constexpr auto kFirst =
        table_of<uint16_t, 32>([](int i) { return i / 16 * 4; });
    alignas(64) static constexpr auto kSecond =
        table_of<uint16_t, 32>([](int i) { return i / 16 * 4 + 8; });
    __m512i first = _mm512_srlv_epi16(twice, constant(kFirst));
    __m512i second = _mm512_srlv_epi16(twice, constant(kSecond));
    __m512i table;
    if constexpr (kGroup == 32) {
      alignas(64) static constexpr auto kUpper =
          table_of<uint16_t, 32>([](int i) { return i % 16 / 8 * 16; });
      constexpr int kAndOr = 0xea; // (a & b) | c
      const __m512i mask = _mm512_set1_epi16(15);
      first = _mm512_ternarylogic_epi32(first, mask, constant(kUpper), kAndOr);
      second = _mm512_ternarylogic_epi32(second, mask, constant(kUpper), kAndOr);
      const __m512 others =
          _mm512_fmadd_ps(codes, _mm512_set1_ps(scales[1]), _mm512_set1_ps(biases[1]));
      table = (__m512i)_mm512_cvtne2ps_pbh(others, values);
    } else {
      table = (__m512i)_mm512_cvtne2ps_pbh(values, values);
    }
    _mm512_store_si512(step0, _mm512_permutexvar_epi16(first, table));
    _mm512_store_si512(step1, _mm512_permutexvar_epi16(second, table));
  } else {
    const __m512i codes = natural_bytes<kBits>(from, count);
    const __m512 scale1 = kGroup == 32 ? _mm512_set1_ps(scales[1]) : scale;
    const __m512 bias1 = kGroup == 32 ? _mm512_set1_ps(biases[1]) : bias;
    const auto quarter = [](__m128i bytes, __m512 s, __m512 b) __attribute__((always_inline)) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), s, b);
    };
    const __m512 a = quarter(_mm512_castsi512_si128(codes), scale, bias);
    const __m512 b = quarter(_mm512_extracti32x4_epi32(codes, 1), scale, bias);
    const __m512 c = quarter(_mm512_extracti32x4_epi32(codes, 2), scale1, bias1);
    const __m512 d = quarter(_mm512_extracti32x4_epi32(codes, 3), scale1, bias1);
    _mm512_store_si512(step0, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    _mm512_store_si512(step1, (__m512i)_mm512_cvtne2ps_pbh(d, c));
  }
}

// One unit of `rows` rows of x (16 at most) as two bfloat16 B tiles.
template <int kBits>
inline void pack_unit(const float* x, int64_t stride, int64_t rows, int count, uint16_t* step0,
                      uint16_t* step1) {
  __m512i first[16], second[16];
  for (int m = 0; m < 16; ++m, x += stride) {
    first[m] = second[m] = _mm512_setzero_si512();
    if (m >= rows)
      continue;
    const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
    __m512i high = _mm512_setzero_si512();
    if (count == kUnit)
      high = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 48), _mm512_loadu_ps(x + 32));
    if constexpr (kBits == 4) {
      alignas(64) static constexpr auto kFirst = table_of<uint16_t, 32>(bf16_order<kBits>);
      alignas(64) static constexpr auto kSecond =
          table_of<uint16_t, 32>([](int i) { return bf16_order<kBits>(kStep + i); });
      first[m] = _mm512_permutex2var_epi16(low, constant(kFirst), high);
      second[m] = _mm512_permutex2var_epi16(low, constant(kSecond), high);
    } else {
      first[m] = low;
      second[m] = high;
    }
  }
  transpose(first);
  transpose(second);
  for (int i = 0; i < 16; ++i) {
    _mm512_store_si512(step0 + 32 * i, first[i]);
    _mm512_store_si512(step1 + 32 * i, second[i]);
  }
}

// A tile of products [features, rows] to y [rows, features].
inline void write_tile(const float* tile, float* y, int64_t stride, int64_t rows,
                       int64_t features) {
  __m512i v[16];
  for (int i = 0; i < 16; ++i)
    v[i] = _mm512_load_si512(tile + 16 * i);
  transpose(v);
  const __mmask16 mask = first_lanes(features);
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m)
    if (m < rows)
      _mm512_mask_storeu_ps(y + m * stride, mask, _mm512_castsi512_ps(v[m]));
}

#else

template <int kBits> inline void natural_bytes(const uint8_t* from, int count, uint8_t* to) {
  for (int i = 0; i < kUnit; ++i) {
    const int bit = i * kBits, shift = bit % 8;
    int code = 0;
    if (i < count) {
      code = from[bit / 8] >> shift;
      if (shift + kBits > 8)
        code |= from[bit / 8 + 1] << (8 - shift);
    }
    to[i] = uint8_t(code & ((1 << kBits) - 1));
  }
}

inline void widen_groups(const void* values, DType dtype, int64_t index, int64_t count, float* to) {
  for (int i = 0; i < kLanes; ++i)
    to[i] = i < count ? widen_at(values, dtype, index + i) : 0.0f;
}

inline uint16_t to_bf16(float value) { return narrow<BFloat16>(flushed(value)).bits; }

template <int kBits, int kGroup>
inline void dequantize_unit(const uint8_t* from, int count, const float* scales,
                            const float* biases, uint16_t* step0, uint16_t* step1) {
  uint8_t natural[kUnit];
  natural_bytes<kBits>(from, count, natural);
  uint16_t* const steps[2] = {step0, step1};
  for (int s = 0; s < 2; ++s)
    for (int i = 0; i < kStep; ++i) {
      const int k = bf16_order<kBits>(s * kStep + i), group = kGroup == 32 ? k / 32 : 0;
      steps[s][i] = to_bf16(std::fma(float(natural[k]), scales[group], biases[group]));
    }
}

template <int kBits>
inline void pack_unit(const float* x, int64_t stride, int64_t rows, int count, uint16_t* step0,
                      uint16_t* step1) {
  uint16_t* const steps[2] = {step0, step1};
  for (int s = 0; s < 2; ++s)
    for (int i = 0; i < kStep; ++i)
      for (int m = 0; m < 16; ++m) {
        const int k = bf16_order<kBits>(s * kStep + i);
        const float value = m < rows && k < count ? x[m * stride + k] : 0.0f;
        steps[s][i / 2 * 32 + m * 2 + i % 2] = to_bf16(value);
      }
}

inline void write_tile(const float* tile, float* y, int64_t stride, int64_t rows,
                       int64_t features) {
  for (int64_t m = 0; m < std::min<int64_t>(rows, 16); ++m)
    for (int64_t n = 0; n < std::min<int64_t>(features, 16); ++n)
      y[m * stride + n] = tile[n * 16 + m];
}

#endif

// Calls f.template operator()<bits, group_size>() for the format of w.
template <int kBits, typename F> void for_group_size(const PackedMatrix& w, const F& f) {
  switch (w.group_size) {
  case 32:
    return f.template operator()<kBits, 32>();
  case 64:
    return f.template operator()<kBits, 64>();
  default:
    return f.template operator()<kBits, 128>();
  }
}

template <typename F> void for_format(const PackedMatrix& w, const F& f) {
  switch (w.bits) {
  case 2:
    return for_group_size<2>(w, f);
  case 3:
    return for_group_size<3>(w, f);
  case 4:
    return for_group_size<4>(w, f);
  case 5:
    return for_group_size<5>(w, f);
  case 6:
    return for_group_size<6>(w, f);
  default:
    return for_group_size<8>(w, f);
  }
}

} // namespace
} // namespace q4metal::cpu
