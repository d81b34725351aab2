// The int8 GEMM for AVX-512 VNNI: x as bytes with a scale for each group, W's codes as they are.
//
// After each group of a tile of 4 rows and 32 features its sums join float32 sums, which stay in
// registers:
//
//   y += float(t[g]) * scale[g] * sx[g]
//
// Multiplications share their units with vpdpbusd, so there are two of them and no more: the biases
// are a product of their own, 16 groups deep, of 16-bit integers,
//
//   sum over g of bias[g] * (sum of x's integers * sx)[g],
//
// whose euclidean norms are such that int32 does not overflow (avx512_fast_gemm.cpp).
#include "avx512_gemm.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

constexpr int kCodes = 4;       // in a dword
constexpr int kTileVectors = 2; // of 16 features
constexpr int64_t kTile = kTileVectors * kLanes;
constexpr int64_t kBlock = 512; // columns; their panel is 16 KB
constexpr int64_t kMostGroups = kBlock / 32, kMostPairs = kMostGroups / 2;
constexpr int64_t kFeaturesAtATime = 192; // that use x while it is in the L2 cache
constexpr float kNorm = 32000.0f;         // of biases and sums of a block, as integers

constexpr int64_t pairs_in(int64_t groups) { return (groups + 1) / 2; }

// Four rows of x: their dwords; four scales for each group; for each block the sums of its groups,
// scaled, four dwords for two groups, and four units of these.
struct Quad {
  int64_t dwords, groups, pairs, blocks; // pairs: in a block

  explicit Quad(const PackedMatrix& w)
      : dwords(w.in_features / kCodes), groups(w.groups()), pairs(pairs_in(kBlock / w.group_size)),
        blocks((w.in_features + kBlock - 1) / kBlock) {}
  int64_t bytes() const { return (dwords + groups + (pairs + 1) * blocks) * kQuad * 4; }
  const int32_t* codes(const std::byte* quad) const {
    return reinterpret_cast<const int32_t*>(quad);
  }
  const float* scales(const std::byte* quad) const {
    return reinterpret_cast<const float*>(quad) + dwords * kQuad;
  }
  const int32_t* sums(const std::byte* quad) const {
    return reinterpret_cast<const int32_t*>(quad) + (dwords + groups) * kQuad;
  }
  const float* units(const std::byte* quad) const {
    return reinterpret_cast<const float*>(quad) + (dwords + groups + pairs * blocks) * kQuad;
  }
};

// ---- x

// Columns [first, first + columns), a block, of four rows, of which `count` exist.
template <int kCodesInByte>
void prepare_block(const PackedMatrix& w, const float* x, int64_t count, int64_t first,
                   int64_t columns, std::byte* quad) {
  const Quad layout(w);
  const int64_t block = first / kBlock, group = first / w.group_size;
  auto* codes_out = const_cast<int32_t*>(layout.codes(quad)) + first / kCodes * kQuad;
  auto* scales_out = const_cast<float*>(layout.scales(quad)) + group * kQuad;
  auto* sums_out = const_cast<int32_t*>(layout.sums(quad)) + block * layout.pairs * kQuad;
  auto* units_out = const_cast<float*>(layout.units(quad)) + block * kQuad;
  alignas(64) int16_t codes[kQuad][kBlock];
  for (int64_t r = 0; r < kQuad; ++r) {
    alignas(64) float scales[kMostGroups] = {}, sums[kMostGroups] = {};
    round_columns(x + std::min(r, count - 1) * w.in_features + first, columns, w.group_size,
                  split_format(Precision::int8, w.group_size), codes[r], scales, sums);
    for (int64_t g = 0; g < columns / w.group_size; ++g) {
      scales_out[g * kQuad + r] = scales[g];
      sums[g] *= scales[g];
    }
    const SplitScale s = scale_to_norm(sums, kMostGroups, kNorm);
    units_out[r] = s.scale;
    const __m512i v =
        _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(s.inverse)));
    alignas(32) int32_t pairs[kMostPairs];
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm512_cvtepi32_epi16(v));
    for (int64_t i = 0; i < layout.pairs; ++i)
      sums_out[i * kQuad + r] = pairs[i];
  }
  if (columns % 64 != 0)
    for (auto& row : codes)
      std::fill_n(row + columns, 32, int16_t(0));
  interleave_rows<kCodes, kCodesInByte>(codes, columns, codes_out);
}

// ---- W

struct Panel {
  alignas(64) __m512i codes[kBlock / kCodes][kTileVectors]; // a step's vectors
  alignas(64) __m512 scales[kMostGroups][kTileVectors];
  alignas(64) __m512i biases[kMostPairs][kTileVectors]; // of two groups each, in `units`
  alignas(64) __m512 units[kTileVectors];
};

// Scales and biases of `count` groups of 16 features as vector `n` of a panel.
void expand_groups(const PackedMatrix& w, Features features, int64_t group, int64_t count, int n,
                   Panel& panel) {
  __m512 scales[kLanes], biases[kLanes];
  transpose_groups(w, w.scales, features, group, scales);
  transpose_groups(w, w.biases, features, group, biases);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t g = 0; g < count; ++g) {
    panel.scales[g][n] = scales[g];
    squares = _mm512_fmadd_ps(biases[g], biases[g], squares);
  }
  const __m512 unit = _mm512_div_ps(_mm512_sqrt_ps(squares), _mm512_set1_ps(kNorm));
  const __mmask16 some = _mm512_cmp_ps_mask(unit, _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), unit);
  panel.units[n] = _mm512_maskz_mov_ps(some, unit);
  for (int64_t i = 0; i < pairs_in(count); ++i) {
    // x has a zero for a group that does not exist.
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(biases[2 * i], inverse));
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(biases[2 * i + 1], inverse));
    panel.biases[i][n] = pairs_of(first, second);
  }
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

// What a tile of up to 4 rows and 32 features works on: a block.
struct Tile {
  const Panel* panel;
  const int32_t* codes;
  const float* scales;
  const int32_t* sums;
  const float* units;
  int64_t groups;
  int64_t steps; // per group
  int64_t rows, features;
  float* y;
  int64_t y_stride;
  bool accumulate;
};

// By value, and not inlined: what a tile says then stays in registers between the writes to y.
template <int kVectors> __attribute__((noinline)) void run_tile(const Tile tile) {
  const Panel& panel = *tile.panel;
  const __m512i* codes = panel.codes[0];
  const int32_t* x = tile.codes;
  __m512 sums[kQuad][kVectors] = {};
  for (int64_t g = 0; g < tile.groups; ++g) {
    Int32Vec t[kQuad][kVectors] = {};
    for (int64_t step = 0; step < tile.steps; ++step, codes += kTileVectors, x += kQuad)
#pragma GCC unroll 4
      for (int m = 0; m < kQuad; ++m) {
        const __m512i code = _mm512_set1_epi32(x[m]);
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          t[m][n] = multiply_add(t[m][n], codes[n], code);
      }
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < kQuad; ++m) {
        const __m512 u = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)t[m][n]), panel.scales[g][n]);
        sums[m][n] = _mm512_fmadd_ps(u, _mm512_set1_ps(tile.scales[g * kQuad + m]), sums[m][n]);
      }
  }
  Int32Vec t[kQuad][kVectors] = {};
  for (int64_t i = 0; i < pairs_in(tile.groups); ++i)
#pragma GCC unroll 4
    for (int m = 0; m < kQuad; ++m) {
      const __m512i pair = _mm512_set1_epi32(tile.sums[i * kQuad + m]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n)
        t[m][n] = (Int32Vec)_mm512_dpwssd_epi32((__m512i)t[m][n], panel.biases[i][n], pair);
    }
  float* y = tile.y;
#pragma GCC unroll 4
  for (int m = 0; m < kQuad; ++m, y += tile.y_stride) {
    if (m >= tile.rows)
      return;
    const __m512 unit = _mm512_set1_ps(tile.units[m]);
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      const __mmask16 lanes = first_lanes(tile.features - kLanes * n);
      const __m512 u = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)t[m][n]), panel.units[n]);
      const __m512 sum = _mm512_fmadd_ps(u, unit, sums[m][n]);
      const __m512 before =
          tile.accumulate ? _mm512_maskz_loadu_ps(lanes, y + kLanes * n) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(y + kLanes * n, lanes, _mm512_add_ps(sum, before));
    }
  }
}

// All rows of x times the panel of the block at `column`.
void run_panel(const Quad& layout, const std::byte* prepared, int64_t rows, int64_t column,
               int64_t group, Tile tile) {
  const int64_t block = column / kBlock, bytes = layout.bytes();
  tile.codes = layout.codes(prepared) + column / kCodes * kQuad;
  tile.scales = layout.scales(prepared) + group * kQuad;
  tile.sums = layout.sums(prepared) + block * layout.pairs * kQuad;
  tile.units = layout.units(prepared) + block * kQuad;
  for (int64_t m = 0; m < rows; m += kQuad) {
    tile.rows = std::min<int64_t>(kQuad, rows - m);
    tile.features > kLanes ? run_tile<2>(tile) : run_tile<1>(tile);
    tile.codes = after(tile.codes, bytes);
    tile.scales = after(tile.scales, bytes);
    tile.sums = after(tile.sums, bytes);
    tile.units = after(tile.units, bytes);
    tile.y += kQuad * tile.y_stride;
  }
}

} // namespace

void Avx512Int8Gemm::prepare(const PackedMatrix& w, const float* x, int64_t rows, int64_t first,
                             int64_t last, std::byte* prepared) {
  const auto block = w.bits == 4 ? prepare_block<fields_of(4)> : prepare_block<fields_of(8)>;
  const int64_t bytes = Quad(w).bytes();
  for (int64_t m = first; m < last; m += kQuad)
    for (int64_t k = 0; k < w.in_features; k += kBlock)
      block(w, x + m * w.in_features, std::min<int64_t>(kQuad, rows - m), k,
            std::min(kBlock, w.in_features - k), prepared + m / kQuad * bytes);
}

size_t Avx512Int8Gemm::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return round_up(rows, kQuad) / kQuad * Quad(w).bytes();
}

void Avx512Int8Gemm::run(const PackedMatrix& w, const float*, const std::byte* prepared,
                         int64_t rows, float* y, int64_t begin, int64_t end) {
  static thread_local Panel thread_panel;
  Panel& panel = thread_panel; // its address is computed once
  const auto expand_vector = w.bits == 4 ? expand<fields_of(4)> : expand<fields_of(8)>;
  const Quad layout(w);
  for (int64_t first = begin; first < end; first += kFeaturesAtATime)
    for (int64_t k = 0; k < w.in_features; k += kBlock) {
      const int64_t columns = std::min(kBlock, w.in_features - k);
      for (int64_t n = first; n < std::min(first + kFeaturesAtATime, end); n += kTile) {
        Tile tile{};
        tile.panel = &panel;
        tile.groups = columns / w.group_size;
        tile.steps = w.group_size / kCodes;
        tile.features = std::min(kTile, end - n);
        tile.y = y + n;
        tile.y_stride = w.out_features;
        tile.accumulate = k > 0;
        for (int64_t i = 0; i < tile.features; i += kLanes)
          expand_vector(w, {n + i, end}, k, columns, int(i / kLanes), panel);
        run_panel(layout, prepared, rows, k, k / w.group_size, tile);
      }
    }
}

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
