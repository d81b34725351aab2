// The rows of x for the int8 GEMM for AVX-512 (avx512_int8_gemm.cpp), four at a time.
#pragma once

#include <limits>

#include "avx512_gemm.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

constexpr int kCodes = 4;                      // in a dword
constexpr int64_t kMostColumns = kWidestBlock; // of a block; its panel is 20 KB
constexpr int64_t kMostGroups = kMostColumns / 32, kMostPairs = kMostGroups / 2;
constexpr float kNorm = 32000.0f; // of a block's scales, biases and sums, as integers

constexpr int64_t pairs_in(int64_t groups) { return (groups + 1) / 2; }

// Blocks of about the same size, whole pairs of groups.
int64_t block_of(const PackedMatrix& w) {
  const int64_t blocks = (w.in_features + kMostColumns - 1) / kMostColumns;
  return round_up((w.in_features + blocks - 1) / blocks, std::min(2 * w.group_size, 128));
}

// Codes count from here.
constexpr int middle_of(int bits) { return 1 << (bits - 1); }

// Bits of a group's sum of products of bytes that 16 do not hold.
int excess_bits(const PackedMatrix& w) {
  return std::max(w.bits - 1 + std::countr_zero(unsigned(w.group_size)) + 7 - 15, 0);
}

// Four rows of x: their dwords; what sums of products begin with, for each group; for each block
// scales and sums of its groups, scaled, four dwords for two groups each, and four units of both.
struct Quad {
  int64_t dwords, groups, block, pairs, blocks; // pairs: in a block

  explicit Quad(const PackedMatrix& w)
      : dwords(w.in_features / kCodes), groups(w.groups()), block(block_of(w)),
        pairs(pairs_in(block / w.group_size)), blocks((w.in_features + block - 1) / block) {}
  int64_t bytes() const { return (dwords + groups + 2 * (pairs + 1) * blocks) * kQuad * 4; }
  const int32_t* codes(const std::byte* quad) const {
    return reinterpret_cast<const int32_t*>(quad);
  }
  const int32_t* starts(const std::byte* quad) const { return codes(quad) + dwords * kQuad; }
  const int32_t* scales(const std::byte* quad) const { return starts(quad) + groups * kQuad; }
  const int32_t* sums(const std::byte* quad) const { return scales(quad) + pairs * blocks * kQuad; }
  const float* units(const std::byte* quad) const {
    return reinterpret_cast<const float*>(sums(quad) + pairs * blocks * kQuad);
  }
};

// Two levels of `halves`. kCount 16: quarter i is what `join` makes of the quarters of v[i]; 4:
// lane i of a quarter is what it makes of the lanes of v[i]'s quarter.
template <int kCount, typename Join>
Q4_INLINE __m512i join_four(const __m512i (&v)[4], const Join& join) {
  const Halves a = halves<kCount>(v[0], v[1]), b = halves<kCount>(v[2], v[3]);
  const Halves c = halves<kCount / 2>(join(a.low, a.high), join(b.low, b.high));
  return join(c.low, c.high);
}

// What `join` makes of all quarters, in each.
template <typename Join> Q4_INLINE __m512 join_quarters(__m512 v, const Join& join) {
  v = join(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  return join(v, _mm512_shuffle_f32x4(v, v, 0xb1));
}

Q4_INLINE __m512i magnitude_bits(__m512 v) {
  return _mm512_and_si512(_mm512_set1_epi32(0x7fffffff), _mm512_castps_si512(v));
}

// The columns of 8 dwords of x as 16-bit integers in the order in which two packings leave 32
// columns, so that a third one leaves 16 dwords in the interleaved order.
template <int kCodesInByte> Q4_INLINE __m512i order_words(__m512i packed) {
  using D = Dwords<kCodes, kCodesInByte>;
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 32> order{};
    for (int i = 0; i < 32; ++i) {
      const int dword = i / 8 + i % 8 / kCodes * 4, column = D::code_at(dword, i % kCodes);
      order[i] = int16_t(column % 16 / 4 * 8 + column / 16 * 4 + column % 4);
    }
    return order;
  }();
  return _mm512_permutexvar_epi16(load(kOrder.data()), packed);
}

// 32 columns of a row, divided by the scale.
template <int kCodesInByte> Q4_INLINE __m512i round_words(const float* x, float inverse) {
  const auto rounded = [&](int i) __attribute__((always_inline)) {
    return _mm512_cvtps_epi32(
        _mm512_mul_ps(_mm512_loadu_ps(x + i * kLanes), _mm512_set1_ps(inverse)));
  };
  return order_words<kCodesInByte>(_mm512_packs_epi32(rounded(0), rounded(1)));
}

// Four groups of four rows: a scale as in split.h, for lane 4r + g.
struct GroupScales {
  __m512 scale, inverse;

  explicit GroupScales(__m512i largest_bits) {
    const __m512 largest = _mm512_castsi512_ps(largest_bits), range = _mm512_set1_ps(kInt8Range);
    const __mmask16 bad = not_finite(largest);
    const __mmask16 some = _mm512_test_epi32_mask(largest_bits, largest_bits) & ~bad;
    scale = _mm512_mask_mov_ps(_mm512_maskz_div_ps(some, largest, range), bad, not_a_number());
    inverse = _mm512_maskz_div_ps(some, range, largest);
  }

  static __m512 not_a_number() { return _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()); }
  static __mmask16 not_finite(__m512 v) {
    return _mm512_cmp_ps_mask(v, _mm512_set1_ps(std::numeric_limits<float>::max()), _CMP_NLE_UQ);
  }
};

// Values of a block's groups, four vectors' worth of four groups of four rows, as integers in pairs
// and four units (scale_to_norm).
constexpr int64_t kMostQuarters = round_up(kMostGroups, 8) / 4;

void write_pairs(const __m512 (&values)[kMostQuarters], int64_t pairs, int32_t* out, float* units) {
  const auto max = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  };
  const auto add = [](__m512 a, __m512 b)
                       __attribute__((always_inline)) { return _mm512_add_ps(a, b); };
  __m512 largest = _mm512_setzero_ps();
  for (const __m512 v : values)
    largest = max(largest, _mm512_castsi512_ps(magnitude_bits(v)));
  largest = join_quarters(largest, max);
  const __mmask16 bad = GroupScales::not_finite(largest);
  const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kSmallest), _CMP_GE_OQ) & ~bad;
  __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), largest);
  __m512 squares = _mm512_setzero_ps();
  for (const __m512 v : values) {
    const __m512 u = _mm512_mul_ps(v, inverse);
    squares = _mm512_fmadd_ps(u, u, squares);
  }
  const __m512 range =
      _mm512_div_ps(_mm512_set1_ps(kNorm), _mm512_sqrt_ps(join_quarters(squares, add)));
  const __m512 unit = _mm512_mask_mov_ps(_mm512_maskz_div_ps(some, largest, range), bad,
                                         GroupScales::not_a_number());
  _mm_storeu_ps(units, _mm512_castps512_ps128(unit));
  inverse = _mm512_maskz_div_ps(some, range, largest);
  for (int64_t i = 0; i < pairs; i += 4, out += kLanes) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(values[i / 2], inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(values[i / 2 + 1], inverse));
    const __m512i both =
        pairs_of(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_mask_storeu_epi32(out, first_lanes((pairs - i) * kQuad), both);
  }
}

// Columns [first, first + columns), a block, of four rows, of which `count` exist.
template <int kCodesInByte>
void prepare_block(const PackedMatrix& w, const Quad& layout, const float* x, int64_t count,
                   int64_t first, int64_t columns, std::byte* quad) {
  const int64_t block = first / layout.block, size = w.group_size;
  auto* codes_out = const_cast<int32_t*>(layout.codes(quad)) + first / kCodes * kQuad;
  auto* starts_out = const_cast<int32_t*>(layout.starts(quad)) + first / size * kQuad;
  const __m512i middle = _mm512_set1_epi32(middle_of(w.bits));
  const __m512i half = _mm512_set1_epi32((1 << excess_bits(w)) / 2);
  const __m512i ones = _mm512_set1_epi8(1);
  const auto max = [](__m512i a, __m512i b)
                       __attribute__((always_inline)) { return _mm512_max_epi32(a, b); };
  const auto add = [](__m512i a, __m512i b)
                       __attribute__((always_inline)) { return _mm512_add_epi32(a, b); };
  const float* rows[kQuad];
  for (int64_t r = 0; r < kQuad; ++r)
    rows[r] = x + std::min(r, count - 1) * w.in_features + first;

  __m512 scales[kMostQuarters] = {}, sums[kMostQuarters] = {};
  for (int64_t k = 0, quarter = 0; k < columns; k += 4 * size, ++quarter) { // four groups
    const int64_t end = std::min(k + 4 * size, columns);
    __m512i largest[4] = {};
    for (int64_t g = k; g < end; g += size) {
      __m512i v[kQuad] = {};
      for (int64_t i = g; i < g + size; i += kLanes)
        for (int r = 0; r < kQuad; ++r)
          v[r] = max(v[r], magnitude_bits(_mm512_loadu_ps(rows[r] + i)));
      largest[(g - k) / size] = join_four<16>(v, max);
    }
    const GroupScales s(join_four<4>(largest, max));
    alignas(64) float inverse[kQuad][4];
    _mm512_store_ps(inverse, s.inverse);

    __m512i group_sums[4] = {};
    for (int64_t i = k; i < end; i += 64) {
      const int64_t g = (i - k) / size, next = (i - k + 32) / size;
      const bool full = end - i >= 64;
      __m512i v[kQuad];
      for (int r = 0; r < kQuad; ++r) {
        const __m512i low = round_words<kCodesInByte>(rows[r] + i, inverse[r][g]);
        const __m512i high = full ? round_words<kCodesInByte>(rows[r] + i + 32, inverse[r][next])
                                  : _mm512_setzero_si512();
        v[r] = _mm512_packs_epi16(low, high);
      }
      transpose<kQuad>(v);
      for (int j = 0; j < (full ? 4 : 2); ++j, codes_out += kLanes) {
        store(codes_out, v[j]);
        __m512i& sum = group_sums[j < 2 ? g : next];
        sum = _mm512_dpbusd_epi32(sum, ones, v[j]);
      }
    }
    const __m512i sum = join_four<16>(group_sums, add);
    const __m512i start = _mm512_sub_epi32(half, _mm512_mullo_epi32(sum, middle));
    _mm512_mask_storeu_epi32(starts_out + k / size * kQuad, first_lanes((end - k) / size * kQuad),
                             start);
    scales[quarter] = interleave(s.scale);
    sums[quarter] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales[quarter]);
  }
  auto* units_out = const_cast<float*>(layout.units(quad)) + 2 * block * kQuad;
  write_pairs(scales, layout.pairs,
              const_cast<int32_t*>(layout.scales(quad)) + block * layout.pairs * kQuad, units_out);
  write_pairs(sums, layout.pairs,
              const_cast<int32_t*>(layout.sums(quad)) + block * layout.pairs * kQuad,
              units_out + kQuad);
}

} // namespace
} // namespace q4metal::cpu
