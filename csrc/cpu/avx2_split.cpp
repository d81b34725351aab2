// The fast matvec for AVX2: 16-bit activations (split.h), integer sums per group.
//
// 4 bits: bytes hold codes 2j and 2j + 1, so x16 is stored as two int8 planes, high and low, each
// split into even and odd k. maddubs(15, -128) twice is 7680, far from the int16 limit, so the
// planes are added before they are widened: 12 instructions for 64 weights, against 27 of the float
// kernel. Other widths become bytes first and meet x16 as int16 (maddubs would saturate for 8 bits:
// 255 * 127 * 2 > 32767).
#include <type_traits>

#include "split.h"

#include "avx2.h" // from here on everything compiles for AVX2

namespace q4metal::cpu {
namespace {

// Codes that one vector of packed (4 bits) or unpacked bytes holds.
constexpr int64_t unit_codes(int bits) { return bits == 4 ? 64 : 32; }

// A prepared row: codes of 2 bytes for whole units, then per group its sx and float(sum x16) * sx,
// each padded with zeros to whole turns of the 16 lanes.
struct PreparedRow {
  int64_t codes, groups;

  explicit PreparedRow(const PackedMatrix& w)
      : codes(round_up(w.in_features, 64)), groups(round_up(w.groups(), kSplitLanes)) {}
  int64_t bytes() const { return round_up(codes * 2 + groups * 8, 64); }
  const float* scales(const std::byte* row) const {
    return reinterpret_cast<const float*>(row + codes * 2);
  }
  const float* sums(const std::byte* row) const { return scales(row) + groups; }
};

size_t prepared_bytes(const PackedMatrix& w, int64_t rows) { return rows * PreparedRow(w).bytes(); }

// By comparison of bits, as split_scale wants it.
float largest_magnitude(const float* x, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t k = 0; k < count; k += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + k));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(magnitude, bits));
  }
  __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

int32_t horizontal_sum(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// 32 x16 in natural order as two vectors, and their sum.
int32_t round_32(const float* x, __m256 inverse, __m256i* out) {
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

// 16 bytes each of high even, high odd, low even, low odd, from 32 x16.
void store_planes(const __m256i* x16, std::byte* out) {
  __m256i even[2], odd[2];
  for (int i = 0; i < 2; ++i) {
    even[i] = _mm256_srai_epi32(_mm256_slli_epi32(x16[i], 16), 16);
    odd[i] = _mm256_srai_epi32(x16[i], 16);
  }
  const auto store = [](std::byte* to, __m256i first, __m256i second) {
    const __m256i words = _mm256_packs_epi32(first, second); // 0-3 8-11 | 4-7 12-15
    const __m256i bytes = _mm256_packs_epi16(words, words);  // each half twice
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
  };
  const __m256i half = _mm256_set1_epi32(128);
  const auto high_byte = [&](__m256i v) { return _mm256_srai_epi32(_mm256_add_epi32(v, half), 8); };
  const auto low_byte = [&](__m256i v) {
    return _mm256_sub_epi32(v, _mm256_slli_epi32(high_byte(v), 8));
  };
  store(out, high_byte(even[0]), high_byte(even[1]));
  store(out + 32, high_byte(odd[0]), high_byte(odd[1]));
  store(out + 64, low_byte(even[0]), low_byte(even[1]));
  store(out + 96, low_byte(odd[0]), low_byte(odd[1]));
}

template <Precision kPrecision>
void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
  const SplitFormat format = split_format(kPrecision, w.group_size);
  const PreparedRow layout(w);
  for (int64_t m = 0; m < rows; ++m, x += w.in_features, prepared += layout.bytes()) {
    std::memset(prepared + (layout.codes - 64) * 2, 0, layout.bytes() - (layout.codes - 64) * 2);
    float* scales = const_cast<float*>(layout.scales(prepared));
    float* sums = const_cast<float*>(layout.sums(prepared));
    for (int64_t first = 0; first < w.in_features; first += format.block) {
      const int64_t last = std::min(first + format.block, w.in_features);
      const SplitScale s = split_scale(largest_magnitude(x + first, last - first), format.range);
      const __m256 inverse = _mm256_set1_ps(s.inverse);
      int32_t sum = 0;
      for (int64_t k = first; k < last; k += 32) {
        __m256i x16[2];
        sum += round_32(x + k, inverse, x16);
        if (w.bits == 4) {
          store_planes(x16, prepared + k / 64 * 128 + k % 64 / 2);
        } else {
          _mm256_store_si256(reinterpret_cast<__m256i*>(prepared + 2 * k), x16[0]);
          _mm256_store_si256(reinterpret_cast<__m256i*>(prepared + 2 * k) + 1, x16[1]);
        }
        if ((k + 32) % w.group_size == 0) {
          scales[k / w.group_size] = s.scale;
          sums[k / w.group_size] = float(sum) * s.scale;
          sum = 0;
        }
      }
    }
  }
}

Q4_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// ---- where codes come from: two vectors per unit of 4 bits, one per unit of other widths

struct Packed4 {
  const uint8_t* row;

  // `half`: only the first 32 codes exist.
  Q4_INLINE void unit(int64_t k, bool half, __m256i* out) const {
    const uint8_t* p = row + k / 2;
    const __m256i v =
        half ? _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
             : load(p);
    const __m256i nibble = _mm256_set1_epi8(15);
    out[0] = _mm256_and_si256(v, nibble);
    out[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
  }
};

struct Packed8 {
  const uint8_t* row;

  Q4_INLINE void unit(int64_t k, bool, __m256i* out) const { out[0] = load(row + k); }
};

template <int kBits> struct PackedOdd {
  const uint8_t* row;

  Q4_INLINE void unit(int64_t k, bool, __m256i* out) const {
    alignas(32) uint64_t bytes[4];
    for (int i = 0; i < 4; ++i)
      bytes[i] = _pdep_u64(eight_codes<kBits>(row + k * kBits / 8, i),
                           0x0101010101010101u * ((1 << kBits) - 1));
    out[0] = load(bytes);
  }
};

template <int kBits>
using Packed = std::conditional_t<kBits == 4, Packed4,
                                  std::conditional_t<kBits == 8, Packed8, PackedOdd<kBits>>>;

// What `Packed` gave, kept for several rows of x.
template <int kBits> struct Expanded {
  const std::byte* bytes;
  int64_t origin;

  Q4_INLINE void unit(int64_t k, bool, __m256i* out) const {
    const std::byte* p = bytes + (k - origin);
    out[0] = load(p);
    if constexpr (kBits == 4)
      out[1] = load(p + 32);
  }
};

// ---- sums

template <int kBits> Q4_INLINE __m256i unit_sum(const __m256i* codes, const std::byte* x) {
  if constexpr (kBits == 4) {
    const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(codes[0], load(x)),
                                          _mm256_maddubs_epi16(codes[1], load(x + 32)));
    const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(codes[0], load(x + 64)),
                                         _mm256_maddubs_epi16(codes[1], load(x + 96)));
    return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)),
                            _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  } else {
    const __m256i first = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes[0]));
    const __m256i second = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes[0], 1));
    return _mm256_add_epi32(_mm256_madd_epi16(first, load(x)),
                            _mm256_madd_epi16(second, load(x + 32)));
  }
}

// Lanes of four vectors added within 128-bit halves: four low sums, then four high sums.
Q4_INLINE __m256i half_sums(const __m256i* v) {
  return _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
}

// The sums t of groups [g, g + 8) in order; `count` of them exist (8 in the main loop).
template <int kBits, int kGroup, bool kAll, typename Codes>
Q4_INLINE __m256i group_sums(const Codes& codes, const std::byte* x, int64_t g, int64_t count) {
  constexpr int64_t kUnit = unit_codes(kBits);
  if constexpr (kUnit > kGroup) { // a unit of 64 codes holds two groups of 32, one in each half
    __m256i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_setzero_si256();
      if (!kAll && 2 * i >= count)
        continue;
      __m256i c[2];
      const int64_t k = (g + 2 * i) * kGroup;
      codes.unit(k, !kAll && 2 * i + 1 >= count, c);
      v[i] = unit_sum<kBits>(c, x + 2 * k);
    }
    return _mm256_permutevar8x32_epi32(half_sums(v), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  } else {
    __m256i v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      v[i] = _mm256_setzero_si256();
      if (!kAll && i >= count)
        continue;
#pragma GCC unroll 4
      for (int u = 0; u < kGroup / kUnit; ++u) {
        __m256i c[2];
        const int64_t k = (g + i) * kGroup + u * kUnit;
        codes.unit(k, false, c);
        const __m256i sum = unit_sum<kBits>(c, x + 2 * k);
        v[i] = u == 0 ? sum : _mm256_add_epi32(v[i], sum);
      }
    }
    const __m256i first = half_sums(v), second = half_sums(v + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20),
                            _mm256_permute2x128_si256(first, second, 0x31));
  }
}

// The tree of split.h: lanes 8 apart here, then 4, 2, 1.
Q4_INLINE float tree(__m256 low, __m256 high) { return horizontal_sum(_mm256_add_ps(low, high)); }

// Row n of W for 1 row of x, or for several: then its codes are unpacked once, to memory in the
// cache.
template <int kBits, int kGroup, bool kSeveral>
void matvec_row(const PackedMatrix& w, const std::byte* x, int64_t rows, int64_t n, float* y) {
  const PreparedRow layout(w);
  const int64_t groups = w.groups();
  const Packed<kBits> packed{w.weight + n * w.row_stride()};
  constexpr int kMost = kSeveral ? int(kMaxMatvecRows) : 1;
  const int count_rows = kSeveral ? int(rows) : 1;
  __m256 acc[kMost][2], off[kMost][2];
  for (int m = 0; m < count_rows; ++m)
    acc[m][0] = acc[m][1] = off[m][0] = off[m][1] = _mm256_setzero_ps();

  const auto eight_groups = [&]<bool kAll>(int64_t g, int lane) __attribute__((always_inline)) {
    const int64_t count = groups - g;
    for (int64_t b = 0; b < kGroup * kBits; b += 64)
      __builtin_prefetch(packed.row + g * kGroup * kBits / 8 + b + kPrefetchAhead);
    const __m256 scale = load_groups(w, w.scales, n * groups + g, count);
    const __m256 bias = load_groups(w, w.biases, n * groups + g, count);
    alignas(32) std::byte expanded[kSeveral ? 8 * kGroup : 1];
    if constexpr (kSeveral) {
      constexpr int64_t kUnit = unit_codes(kBits);
      const int64_t first = g * kGroup, last = std::min(first + 8 * kGroup, w.in_features);
      for (int64_t k = first; k < last; k += kUnit) {
        __m256i c[2];
        packed.unit(k, last - k < kUnit, c);
        std::memcpy(expanded + (k - first), c, kUnit);
      }
    }
    for (int m = 0; m < count_rows; ++m) {
      const std::byte* row = x + m * layout.bytes();
      __m256i t;
      if constexpr (kSeveral)
        t = group_sums<kBits, kGroup, kAll>(Expanded<kBits>{expanded, g * kGroup}, row, g, count);
      else
        t = group_sums<kBits, kGroup, kAll>(packed, row, g, count);
      const __m256 factor = _mm256_mul_ps(scale, _mm256_load_ps(layout.scales(row) + g));
      acc[m][lane] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), factor, acc[m][lane]);
      off[m][lane] = _mm256_fmadd_ps(bias, _mm256_load_ps(layout.sums(row) + g), off[m][lane]);
    }
  };
  int64_t g = 0;
  for (; g + 16 <= groups; g += 16) {
    eight_groups.template operator()<true>(g, 0);
    eight_groups.template operator()<true>(g + 8, 1);
  }
  if (g + 8 <= groups) {
    eight_groups.template operator()<true>(g, 0);
    if (g + 8 < groups)
      eight_groups.template operator()<false>(g + 8, 1);
  } else if (g < groups) {
    eight_groups.template operator()<false>(g, 0);
  }
  for (int m = 0; m < count_rows; ++m)
    y[m * w.out_features + n] = tree(acc[m][0], acc[m][1]) + tree(off[m][0], off[m][1]);
}

void matvec(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
            int64_t end) {
  for_format(w, [&]<int kBits, int kGroup>() {
    for (int64_t n = begin; n < end; ++n)
      rows == 1 ? matvec_row<kBits, kGroup, false>(w, prepared, rows, n, y)
                : matvec_row<kBits, kGroup, true>(w, prepared, rows, n, y);
  });
}

} // namespace

const MatvecKernel avx2_split_matvec = {prepared_bytes, prepare<Precision::fast>, matvec};
const MatvecKernel avx2_int8_matvec = {prepared_bytes, prepare<Precision::int8>, matvec};

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
