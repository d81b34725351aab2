// The fast GEMM for AVX-512 VNNI: x and W as 16-bit integers with a scale for each block of columns
// of a row.
//
// W is dequantized and rounded again, by which the groups are gone: the products of a block are
// added up in int32, and only their sum is scaled. It does not overflow, because no sum, nor a part
// of one, is larger than the product of the euclidean norms of both rows (Cauchy, Schwarz), and the
// scales are such that this is below 2^31. Relative rms error 3e-4, with outliers of 50 in x too.
#include <cmath>
#include <limits>

#include "avx512_gemm.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

constexpr int kCodes = 2; // in a dword
constexpr int64_t kTileRows = 2 * kQuad;
constexpr int64_t kMostColumns = 384; // of a block; its panel is 24 KB

// The norms of the integers: rounding adds less than 8 to x's and less than 24 to W's.
constexpr float kXNorm = 23700.0f, kWNorm = 90000.0f;
// And the largest of them: |scale| * 2^bits is at most 2.7 times the larger end of a group's range.
constexpr float kWLargest = 12000.0f;

// Blocks of about the same size, whole groups.
int64_t block_of(const PackedMatrix& w) {
  const int64_t blocks = (w.in_features + kMostColumns - 1) / kMostColumns;
  return round_up((w.in_features + blocks - 1) / blocks, std::max(w.group_size, 64));
}

// Four rows of x: their dwords, then four scales for each block.
struct Quad {
  int64_t dwords, block;

  explicit Quad(const PackedMatrix& w) : dwords(w.in_features / kCodes), block(block_of(w)) {}
  int64_t bytes() const { return (dwords + (2 * dwords + block - 1) / block) * kQuad * 4; }
  const int32_t* codes(const std::byte* quad, int64_t column) const {
    return reinterpret_cast<const int32_t*>(quad) + column / kCodes * kQuad;
  }
  const float* scales(const std::byte* quad, int64_t column) const {
    return reinterpret_cast<const float*>(quad) + (dwords + column / block) * kQuad;
  }
};

// ---- x

// For integers whose euclidean norm is `norm`, if rounding did not change it. Where x holds NaN or
// infinity every result is NaN: there is no scale for it. `columns` is a multiple of 16.
SplitScale scale_to_norm(const float* x, int64_t columns, float norm) {
  const float largest = largest_magnitude(x, columns);
  if (!(largest <= std::numeric_limits<float>::max()))
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  if (largest < kSmallest)
    return {0, 0};
  const __m512 inverse = _mm512_set1_ps(1 / largest);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; k += kLanes) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + k), inverse);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float range = norm / std::sqrt(_mm512_reduce_add_ps(squares)); // of the largest
  return {largest / range, range / largest};
}

// 32 codes of a row at `codes` as 16 dwords, interleaved so that `transpose` of four rows puts
// dwords 4i to 4i + 3 of all four into vector i.
template <int kCodesInByte> Q4_INLINE __m512i dwords_of(const int16_t* codes) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 32> order{};
    for (int i = 0; i < 32; ++i)
      order[i] =
          int16_t(Dwords<kCodes, kCodesInByte>::code_at(interleaved(i / kCodes), i % kCodes));
    return order;
  }();
  return _mm512_permutexvar_epi16(load(kOrder.data()), load(codes));
}

// Columns [first, first + columns), a block, of four rows, of which `count` exist.
template <int kCodesInByte>
void prepare_block(const PackedMatrix& w, const float* x, int64_t count, int64_t first,
                   int64_t columns, std::byte* quad) {
  const Quad layout(w);
  alignas(64) int16_t codes[kQuad][kMostColumns];
  float* scales = const_cast<float*>(layout.scales(quad, first));
  for (int64_t r = 0; r < kQuad; ++r) {
    const float* row = x + std::min(r, count - 1) * w.in_features + first;
    const SplitScale s = scale_to_norm(row, columns, kXNorm);
    const __m512 inverse = _mm512_set1_ps(s.inverse);
    scales[r] = s.scale;
    for (int64_t k = 0; k < columns; k += kLanes) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + k), inverse));
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes[r] + k), _mm512_cvtepi32_epi16(v));
    }
  }
  auto* out = const_cast<int32_t*>(layout.codes(quad, first));
  for (int64_t k = 0; k < columns; k += kLanes * kCodes) {
    __m512i v[kQuad];
    for (int r = 0; r < kQuad; ++r)
      v[r] = dwords_of<kCodesInByte>(codes[r] + k);
    transpose<kQuad>(v);
    for (int i = 0; i < kQuad; ++i, out += kLanes)
      store(out, v[i]);
  }
}

// ---- W

struct Panel {
  alignas(64) __m512i codes[kMostColumns / kCodes][kTileVectors]; // a step's vectors
  alignas(64) __m512 scales[kTileVectors];
};

// A group of 16 features in the units of a block: code * scale / 2^bits + bias, the same for both
// codes of a dword.
struct Group {
  __m512i scale, bias;
};

Q4_INLINE __m512i in_both_halves(__m512 v) {
  const __m512i i = _mm512_cvtps_epi32(v);
  return pairs_of(i, i);
}

// The groups of a block and its scales.
__m512 round_groups(const PackedMatrix& w, Features features, int64_t k, int64_t count,
                    Group* groups) {
  __m512 scales[kLanes], biases[kLanes];
  transpose_groups(w, w.scales, features, k / w.group_size, scales);
  transpose_groups(w, w.biases, features, k / w.group_size, biases);
  // A value is at most as large as the first or the last of its group's range.
  const __m512 top = _mm512_set1_ps(float((1 << w.bits) - 1));
  __m512 largest = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t g = 0; g < count; ++g) {
    const __m512 last = _mm512_fmadd_ps(scales[g], top, biases[g]);
    const __m512 most = _mm512_max_ps(_mm512_abs_ps(biases[g]), _mm512_abs_ps(last));
    largest = _mm512_max_ps(largest, most);
    squares = _mm512_fmadd_ps(most, most, squares);
  }
  const __m512 norm = _mm512_sqrt_ps(_mm512_mul_ps(squares, _mm512_set1_ps(float(w.group_size))));
  const __m512 unit = _mm512_max_ps(_mm512_div_ps(largest, _mm512_set1_ps(kWLargest)),
                                    _mm512_div_ps(norm, _mm512_set1_ps(kWNorm))); // NaN if it is
  const __mmask16 some = _mm512_cmp_ps_mask(unit, _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), unit);
  const __m512 levels = _mm512_mul_ps(inverse, _mm512_set1_ps(float(1 << w.bits)));
  for (int64_t g = 0; g < count; ++g)
    groups[g] = {in_both_halves(_mm512_mul_ps(scales[g], levels)),
                 in_both_halves(_mm512_mul_ps(biases[g], inverse))};
  return _mm512_maskz_mov_ps(some, unit);
}

// Columns [k, k + columns), a block, of 16 features as vector `n` of a panel.
template <int kCodesInByte>
void expand(const PackedMatrix& w, Features features, int64_t k, int64_t columns, int n,
            Panel& panel) {
  using D = Dwords<kCodes, kCodesInByte>;
  Group groups[kMostColumns / 32] = {};
  panel.scales[n] = round_groups(w, features, k, columns / w.group_size, groups);
  const PackedRows rows(w, features, k, columns);
  const int64_t bytes = columns / kCodesInByte;
  const int group_shift = std::countr_zero(unsigned(w.group_size / kCodesInByte / 4)); // of dwords
  const __m128i shift = _mm_cvtsi32_si128(15 - w.bits);
  __m512i* out = &panel.codes[0][n];
  for (int64_t at = 0; at < bytes; at += 64) {
    __m512i v[kLanes];
    rows.transpose_at(at, bytes, v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const Group& group = groups[(at / 4 + i) >> group_shift];
#pragma GCC unroll 4
      for (int field = 0; field < D::kFields; ++field, out += kTileVectors) {
        __m512i code; // * 2^(15 - bits)
        if constexpr (kCodesInByte == 2) {
          const int left = 11 - 4 * field;
          const __m512i moved = left > 0 ? _mm512_slli_epi16(v[i], std::max(left, 0))
                                         : _mm512_srli_epi16(v[i], std::max(-left, 0));
          code = _mm512_and_si512(moved, _mm512_set1_epi16(0x7800));
        } else {
          const __m512i byte = field == 0 ? _mm512_and_si512(v[i], _mm512_set1_epi16(0xff))
                                          : _mm512_srli_epi16(v[i], 8);
          code = _mm512_sll_epi16(byte, shift);
        }
        store(out, _mm512_add_epi16(_mm512_mulhrs_epi16(code, group.scale), group.bias));
      }
    }
  }
}

// ---- tiles

// What the rows of x are multiplied with, up to 32 features of a block, and where to.
struct Block {
  const Panel* panel;
  const int32_t* codes; // of the first four rows
  const float* scales;
  int64_t quad_bytes;
  int64_t steps;
  __mmask16 lanes[kTileVectors];
  int64_t rows;
  float* y;
  int64_t y_stride;
  bool accumulate;
};

// `tiles` of kQuads * 4 rows. By value, and not inlined: what a block says then stays in registers,
// or on the stack, between the writes to y. Returns what is left of the block.
template <int kQuads, int kVectors>
__attribute__((noinline)) Block run_tiles(Block b, int64_t tiles) {
  constexpr int kRows = kQuads * kQuad;
  for (; tiles > 0; --tiles, b.rows -= kRows) {
    const __m512i* panel = b.panel->codes[0];
    const int32_t* x[2] = {b.codes, after(b.codes, b.quad_bytes)};
    Int32Vec t[kRows][kVectors] = {};
    for (int64_t step = 0; step < b.steps; ++step) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const __m512i code = _mm512_set1_epi32(x[m / kQuad][m % kQuad]);
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          t[m][n] = (Int32Vec)_mm512_dpwssd_epi32((__m512i)t[m][n], panel[n], code);
      }
      panel += kTileVectors;
      x[0] += kQuad;
      x[1] += kQuad;
    }
    __m512 scales[kVectors];
    for (int n = 0; n < kVectors; ++n)
      scales[n] = b.panel->scales[n];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, b.y += b.y_stride) {
      const __m512 scale = _mm512_set1_ps(after(b.scales, m / kQuad * b.quad_bytes)[m % kQuad]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) {
        const __mmask16 lanes = m < b.rows ? b.lanes[n] : 0;
        float* y = b.y + kLanes * n;
        const __m512 before = _mm512_maskz_loadu_ps(b.accumulate ? lanes : 0, y);
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)t[m][n]), scales[n]);
        _mm512_mask_storeu_ps(y, lanes, _mm512_fmadd_ps(sum, scale, before));
      }
    }
    b.codes = after(b.codes, kQuads * b.quad_bytes);
    b.scales = after(b.scales, kQuads * b.quad_bytes);
  }
  return b;
}

// Tiles of 8 rows, and one of 4 if no more are left.
template <int kVectors> void run_block(Block b) {
  const int64_t tiles = (b.rows + kTileRows - 1 - kQuad) / kTileRows;
  b = run_tiles<2, kVectors>(b, tiles);
  if (b.rows > 0)
    run_tiles<1, kVectors>(b, 1);
}

} // namespace

template <>
void Avx512Gemm<Precision::fast>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                          int64_t first, int64_t last, std::byte* prepared) {
  const auto block = w.bits == 4 ? prepare_block<fields_of(4)> : prepare_block<fields_of(8)>;
  const Quad layout(w);
  for (int64_t m = first; m < last; m += kQuad)
    for (int64_t k = 0; k < w.in_features; k += layout.block)
      block(w, x + m * w.in_features, std::min<int64_t>(kQuad, rows - m), k,
            std::min(layout.block, w.in_features - k), prepared + m / kQuad * layout.bytes());
}

template <>
size_t Avx512Gemm<Precision::fast>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return round_up(rows, kQuad) / kQuad * Quad(w).bytes();
}

template <>
void Avx512Gemm<Precision::fast>::run(const PackedMatrix& w, const float*,
                                      const std::byte* prepared, int64_t rows, float* y,
                                      int64_t begin, int64_t end) {
  static thread_local Panel thread_panel;
  Panel& panel = thread_panel; // its address is computed once
  const auto expand_vector = w.bits == 4 ? expand<fields_of(4)> : expand<fields_of(8)>;
  const Quad layout(w);
  const auto multiply = [&](int64_t k, int64_t columns, int64_t n, int64_t features) {
    const Block b{&panel,
                  layout.codes(prepared, k),
                  layout.scales(prepared, k),
                  layout.bytes(),
                  columns / kCodes,
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
