// Puts activations into the order of avx2_split.h.
#include "avx2_split.h"

namespace q4metal::cpu {
namespace {

// By comparison of bits, as split_scale wants it.
float largest_magnitude(const float* x, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t k = 0; k < count; k += 8)
    largest = _mm256_max_epi32(largest, _mm256_and_si256(load(x + k), magnitude));
  __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return std::bit_cast<float>(_mm_cvtsi128_si32(four));
}

uint32_t horizontal_sum(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// 32 x16 in natural order as two vectors, and their sum (modulo 2^32: it may overflow where x holds
// a NaN, and does not matter there).
uint32_t round_32(const float* x, __m256 inverse, __m256i* out) {
  __m256i part[4], sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
    sum = _mm256_add_epi32(sum, part[i]);
  }
  // packs works within 128-bit halves: the middle quarters change places.
  out[0] = _mm256_permute4x64_epi64(_mm256_packs_epi32(part[0], part[1]), 0xd8);
  out[1] = _mm256_permute4x64_epi64(_mm256_packs_epi32(part[2], part[3]), 0xd8);
  return horizontal_sum(sum);
}

void store_16(std::byte* to, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }

// ---- half strings of 32 x16

void store_4_bits(const __m256i* x16, int planes, std::byte* out) {
  __m256i even[2], odd[2];
  for (int i = 0; i < 2; ++i) {
    even[i] = _mm256_srai_epi32(_mm256_slli_epi32(x16[i], 16), 16);
    odd[i] = _mm256_srai_epi32(x16[i], 16);
  }
  const auto bytes = [](__m256i first, __m256i second) {
    const __m256i words = _mm256_packs_epi32(first, second); // 0-3 8-11 | 4-7 12-15
    const __m256i twice = _mm256_packs_epi16(words, words);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(twice), _mm256_extracti128_si256(twice, 1));
  };
  const __m256i half = _mm256_set1_epi32(128);
  const auto high = [&](__m256i v) { return _mm256_srai_epi32(_mm256_add_epi32(v, half), 8); };
  const auto low = [&](__m256i v) { return _mm256_sub_epi32(v, _mm256_slli_epi32(high(v), 8)); };
  if (planes == 2) {
    store_16(out, bytes(high(even[0]), high(even[1])));
    store_16(out + 16, bytes(high(odd[0]), high(odd[1])));
    out += 32;
  }
  store_16(out, bytes(low(even[0]), low(even[1])));
  store_16(out + 16, bytes(low(odd[0]), low(odd[1])));
}

void store_8_bits(const __m256i* x16, std::byte* out) {
  const __m256i even_odd = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int i = 0; i < 2; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i,
                        _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x16[i], even_odd), 0xd8));
}

void store_in_order(const __m256i* x16, std::byte* out) {
  for (int i = 0; i < 2; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i, x16[i]);
}

// Half strings of a row of x, group after group, set after set. Fills `scales` and `sums`.
void split_to_strings(const PackedMatrix& w, const float* x, SplitFormat format, int planes,
                      std::byte* out, float* scales, float* sums) {
  for (int64_t first = 0; first < w.in_features; first += format.block) {
    const int64_t last = std::min(first + format.block, w.in_features);
    const SplitScale s = split_scale(largest_magnitude(x + first, last - first), format.range);
    const __m256 inverse = _mm256_set1_ps(s.inverse);
    uint32_t sum = 0;
    for (int64_t k = first; k < last; k += 32) {
      __m256i x16[2];
      sum += round_32(x + k, inverse, x16);
      if (w.bits == 4)
        store_4_bits(x16, planes, out);
      else if (w.bits == 8)
        store_8_bits(x16, out);
      else
        store_in_order(x16, out);
      out += w.bits == 4 ? 32 * planes : 64;
      if ((k + 32) % w.group_size == 0) {
        *scales++ = s.scale;
        *sums++ = float(int32_t(sum)) * s.scale;
        sum = 0;
      }
    }
  }
}

// One turn of x from half strings.
void transpose_turn(const PackedMatrix& w, const PreparedRow& row, int strings,
                    const std::byte* all, int64_t turn, std::byte* out) {
  alignas(16) static constexpr std::byte kNothing[16] = {};
  const int64_t sets = w.group_size / half_codes(w.bits), end = row.rows * row.groups;
  const auto half = [&](int64_t group, int64_t set, int string) {
    group += turn * kTurnGroups;
    const std::byte* p =
        group < end ? all + ((group % row.groups * sets + set) * strings + string) * 16 : kNothing;
    return reinterpret_cast<const __m128i*>(p);
  };
  for (int64_t block = 0; block < sets; ++block)
    for (int string = 0; string < strings; ++string) {
      __m256i v[4];
      for (int i = 0; i < 4; ++i) {
        // A vector of weights holds two groups (4 bits, groups of 32), else two sets of one group.
        const int64_t chunks = std::max<int64_t>(sets / 2, 1);
        const int64_t group = sets == 1 ? 2 * i : block / chunks * 4 + i;
        const int64_t set = sets == 1 ? 0 : block % chunks * 2;
        v[i] = _mm256_loadu2_m128i(half(group + (sets == 1), set + (sets > 1), string),
                                   half(group, set, string));
      }
      transpose(v);
      for (int i = 0; i < 4; ++i, out += 32)
        _mm256_store_si256(reinterpret_cast<__m256i*>(out), v[i]);
    }
}

} // namespace

// One row of half strings stands behind the prepared rows while they are made.
template <Precision kPrecision>
size_t Avx2Matvec<kPrecision>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return rows * PreparedRow(w, planes_of(kPrecision)).bytes() + w.in_features * 2;
}

template <Precision kPrecision>
void Avx2Matvec<kPrecision>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                     std::byte* prepared) {
  constexpr int kPlanes = planes_of(kPrecision);
  const SplitFormat format = split_format(kPrecision, w.group_size);
  const PreparedRow row(w, kPlanes);
  std::byte* strings = prepared + rows * row.bytes();
  for (int64_t m = 0; m < rows; ++m, x += w.in_features, prepared += row.bytes()) {
    float* scales = const_cast<float*>(row.scales(prepared));
    float* sums = const_cast<float*>(row.sums(prepared));
    std::memset(scales, 0, row.padded_groups() * 8);
    split_to_strings(w, x, format, kPlanes, strings, scales, sums);
    for (int64_t turn = 0; turn < row.turns; ++turn)
      transpose_turn(w, row, strings_of(w.bits, kPlanes), strings, turn,
                     prepared + turn * row.turn_bytes);
  }
}

template size_t Avx2Matvec<Precision::fast>::prepared_bytes(const PackedMatrix&, int64_t);
template size_t Avx2Matvec<Precision::int8>::prepared_bytes(const PackedMatrix&, int64_t);
template void Avx2Matvec<Precision::fast>::prepare(const PackedMatrix&, const float*, int64_t,
                                                   std::byte*);
template void Avx2Matvec<Precision::int8>::prepare(const PackedMatrix&, const float*, int64_t,
                                                   std::byte*);

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
