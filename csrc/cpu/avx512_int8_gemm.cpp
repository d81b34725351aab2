// The int8 GEMM for AVX-512 VNNI: x as bytes with a scale for each group, W's codes as they are.
//
// Every multiplication takes the place of a vpdpbusd, shifts and permutations do not. So what
// follows the products of two groups of a tile of 4 rows and 32 features is three instructions that
// multiply, on 16-bit integers: the factor of a group's sum t,
//
//   factor[g] = scale[g] * sx[g] / 2^15, rounded
//
// the sum of both groups' factor * t, and, for both biases, of bias * (sum of x's integers * sx).
// All these are integers in the units of a block of a row, of x or of W, whose euclidean norms are
// such that int32 does not overflow (avx512_fast_gemm.cpp). For t to fit, codes count from the
// middle of their range, of which the bias takes account, and t loses what bits it has too many.
#include "avx512_int8_x.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

// ---- W

// Values of a block's groups as integers, two groups in a dword, and their unit.
struct Pairs {
  alignas(64) __m512i values[kMostPairs][kTileVectors];
  alignas(64) __m512 units[kTileVectors];

  void set(int n, const __m512* groups, int64_t count) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t g = 0; g < count; ++g)
      squares = _mm512_fmadd_ps(groups[g], groups[g], squares);
    const __m512 unit = _mm512_div_ps(_mm512_sqrt_ps(squares), _mm512_set1_ps(kNorm));
    const __mmask16 some = _mm512_cmp_ps_mask(unit, _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), unit);
    units[n] = _mm512_maskz_mov_ps(some, unit);
    for (int64_t i = 0; i < pairs_in(count); ++i) // x has zeros for a group that does not exist
      values[i][n] = pairs_of(_mm512_cvtps_epi32(_mm512_mul_ps(groups[2 * i], inverse)),
                              _mm512_cvtps_epi32(_mm512_mul_ps(groups[2 * i + 1], inverse)));
  }
};

struct Panel {
  alignas(64) __m512i codes[kMostColumns / kCodes][kTileVectors]; // a step's vectors
  Pairs scales, biases;
};

// Scales and biases of `count` groups of 16 features as vector `n` of a panel.
void expand_groups(const PackedMatrix& w, Features features, int64_t group, int64_t count, int n,
                   Panel& panel) {
  __m512 scales[round_up(kMostGroups, kLanes)], biases[round_up(kMostGroups, kLanes)];
  const __m512 middle = _mm512_set1_ps(float(middle_of(w.bits)));
  for (int64_t first = 0; first < count; first += kLanes) {
    transpose_groups(w, w.scales, features, group + first, scales + first);
    transpose_groups(w, w.biases, features, group + first, biases + first);
    for (int64_t g = first; g < first + kLanes; ++g)
      biases[g] = _mm512_fmadd_ps(scales[g], middle, biases[g]);
  }
  panel.scales.set(n, scales, count);
  panel.biases.set(n, biases, count);
}

// Columns [k, k + columns), a block, of 16 features as vector `n` of a panel.
template <int kCodesInByte>
void expand(const PackedMatrix& w, Features features, int64_t k, int64_t columns, int n,
            Panel& panel) {
  using D = Dwords<kCodes, kCodesInByte>;
  expand_groups(w, features, k / w.group_size, columns / w.group_size, n, panel);
  const PackedRows rows(w, features, k, columns);
  const __m512i mask = _mm512_set1_epi8(char((1 << D::kCodeBits) - 1));
  const int64_t bytes = columns / kCodesInByte;
  __m512i* out = &panel.codes[0][n];
  for (int64_t at = 0; at < bytes; at += 64) {
    __m512i v[kLanes];
    rows.transpose_at(at, bytes, v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 2
      for (int field = 0; field < D::kFields; ++field, out += kTileVectors)
        store(out, _mm512_and_si512(_mm512_srli_epi32(v[i], field * D::kCodeBits), mask));
  }
}

// ---- tiles

// What the rows of x are multiplied with, up to 32 features of a block, and where to.
struct Block {
  const Panel* panel;
  const int32_t *codes, *starts, *scales, *sums; // of the first four rows
  const float* units;
  int64_t quad_bytes;
  int64_t groups;
  int64_t steps; // per group
  int excess;    // bits of a group's sum
  __mmask16 lanes[kTileVectors];
  int64_t rows;
  float* y;
  int64_t y_stride;
  bool accumulate;
};

// Tiles of 4 rows. By value, and not inlined: what a block says then stays in registers, or on the
// stack, between the writes to y.
template <int kVectors> __attribute__((noinline)) void run_block(Block b) {
  using Tile = Int32Vec[kQuad][kVectors];
  const Panel& panel = *b.panel;
  // Shifts by a number in a short vector would cost a multiplication.
  const __m512i excess = _mm512_set1_epi32(b.excess), left = _mm512_set1_epi32(16 - b.excess);
  const float factor_unit = 32768.0f * float(1 << b.excess); // mulhrs divides by 2^15
  for (; b.rows > 0; b.rows -= kQuad) {
    const __m512i* codes = panel.codes[0];
    const int32_t *x = b.codes, *start = b.starts;
    const auto multiply_group = [&](Tile& t) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int m = 0; m < kQuad; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          t[m][n] = (Int32Vec)_mm512_set1_epi32(start[m]);
      start += kQuad;
      for (int64_t step = 0; step < b.steps; ++step, codes += kTileVectors, x += kQuad)
#pragma GCC unroll 4
        for (int m = 0; m < kQuad; ++m) {
          const __m512i code = _mm512_set1_epi32(x[m]);
#pragma GCC unroll 2
          for (int n = 0; n < kVectors; ++n)
            t[m][n] = multiply_add(t[m][n], codes[n], code);
        }
    };
    Tile sums = {};
    const auto add_pair = [&](int64_t pair, const Tile& first,
                              const Tile& second) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int m = 0; m < kQuad; ++m) {
        const __m512i scale = _mm512_set1_epi32(b.scales[pair * kQuad + m]);
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) {
          const __m512i factors = _mm512_mulhrs_epi16(panel.scales.values[pair][n], scale);
          const __m512i both = _mm512_mask_blend_epi16(
              0xaaaaaaaa, (__m512i)first[m][n], _mm512_sllv_epi32((__m512i)second[m][n], left));
          sums[m][n] = (Int32Vec)_mm512_dpwssd_epi32((__m512i)sums[m][n], both, factors);
        }
      }
    };
    const auto shift = [&](Tile& t) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int m = 0; m < kQuad; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          t[m][n] = (Int32Vec)_mm512_srav_epi32((__m512i)t[m][n], excess);
    };
    for (int64_t pair = 0; pair < b.groups / 2; ++pair) {
      Tile first, second;
      multiply_group(first);
      shift(first);
      multiply_group(second);
      add_pair(pair, first, second);
    }
    if (b.groups % 2 != 0) {
      Tile first, second = {};
      multiply_group(first);
      shift(first);
      add_pair(b.groups / 2, first, second);
    }

    Tile biases = {};
    for (int64_t i = 0; i < pairs_in(b.groups); ++i)
#pragma GCC unroll 4
      for (int m = 0; m < kQuad; ++m) {
        const __m512i pair = _mm512_set1_epi32(b.sums[i * kQuad + m]);
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          biases[m][n] =
              (Int32Vec)_mm512_dpwssd_epi32((__m512i)biases[m][n], panel.biases.values[i][n], pair);
      }

#pragma GCC unroll 4
    for (int m = 0; m < kQuad; ++m, b.y += b.y_stride) {
      const __m512 scale_unit = _mm512_set1_ps(b.units[m] * factor_unit);
      const __m512 bias_unit = _mm512_set1_ps(b.units[kQuad + m]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) {
        const __mmask16 lanes = m < b.rows ? b.lanes[n] : 0;
        float* y = b.y + kLanes * n;
        const __m512 u =
            _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sums[m][n]), panel.scales.units[n]);
        const __m512 v =
            _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)biases[m][n]), panel.biases.units[n]);
        const __m512 before = _mm512_maskz_loadu_ps(b.accumulate ? lanes : 0, y);
        const __m512 sum = _mm512_fmadd_ps(u, scale_unit, _mm512_fmadd_ps(v, bias_unit, before));
        _mm512_mask_storeu_ps(y, lanes, sum);
      }
    }
    b.codes = after(b.codes, b.quad_bytes);
    b.starts = after(b.starts, b.quad_bytes);
    b.scales = after(b.scales, b.quad_bytes);
    b.sums = after(b.sums, b.quad_bytes);
    b.units = after(b.units, b.quad_bytes);
  }
}

} // namespace

template <>
void Avx512Gemm<Precision::int8>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                          int64_t first, int64_t last, std::byte* prepared) {
  const auto block = w.bits == 4 ? prepare_block<fields_of(4)> : prepare_block<fields_of(8)>;
  const Quad layout(w);
  for (int64_t m = first; m < last; m += kQuad)
    for (int64_t k = 0; k < w.in_features; k += layout.block)
      block(w, layout, x + m * w.in_features, std::min<int64_t>(kQuad, rows - m), k,
            std::min(layout.block, w.in_features - k), prepared + m / kQuad * layout.bytes());
}

template <>
size_t Avx512Gemm<Precision::int8>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return round_up(rows, kQuad) / kQuad * Quad(w).bytes();
}

template <>
void Avx512Gemm<Precision::int8>::run(const PackedMatrix& w, const float*,
                                      const std::byte* prepared, int64_t rows, float* y,
                                      int64_t begin, int64_t end) {
  static thread_local Panel thread_panel;
  Panel& panel = thread_panel; // its address is computed once
  const auto expand_vector = w.bits == 4 ? expand<fields_of(4)> : expand<fields_of(8)>;
  const Quad layout(w);
  const auto multiply = [&](int64_t k, int64_t columns, int64_t n, int64_t features) {
    const int64_t block = k / layout.block, pairs = block * layout.pairs * kQuad;
    const Block b{&panel,
                  layout.codes(prepared) + k / kCodes * kQuad,
                  layout.starts(prepared) + k / w.group_size * kQuad,
                  layout.scales(prepared) + pairs,
                  layout.sums(prepared) + pairs,
                  layout.units(prepared) + 2 * block * kQuad,
                  layout.bytes(),
                  columns / w.group_size,
                  w.group_size / kCodes,
                  excess_bits(w),
                  {first_lanes(features), first_lanes(features - kLanes)},
                  rows,
                  y + n,
                  w.out_features,
                  k > 0};
    features > kLanes ? run_block<2>(b) : run_block<1>(b);
  };
  for_blocks(w, layout.block, begin, end, expand_vector, panel, multiply);
}

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
