// The fast and the int8 GEMM for AVX-512 VNNI: integer activations (split.h), sums per group.
//
// A step multiplies one dword of x per row with one vector of W per 16 output features: two int16
// codes and vpdpwssd where x is int16, four bytes and vpdpbusd where it is int8. Features lie
// across lanes. 128 steps of W for 48 features are expanded at a time to a panel of 24 KB, which
// stays in L1 for all rows of x; a tile of 8 rows and 48 features keeps its 24 sums in registers.
// After each group they join float32 sums,
//
//   u = float(t[g]) * scale[g] + float(sum of x's integers) * bias[g],   y += u * sx
//
// in the order of the groups, whatever the rows and ranges. int16 has room for one sx in all the
// columns of a panel (error 1e-4), so there only the sum of u is scaled.
//
// Which codes share a dword follows from W: shifting a dword of packed codes by i codes and masking
// leaves field i, so codes 8u + i and 8u + i + 4 for int16 and 4 bits. `prepare` puts x in that
// order, four rows side by side.
#include "split.h"

#include "avx512.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

constexpr int kQuad = 4;        // rows of x side by side
constexpr int kTileVectors = 3; // of 16 features
constexpr int64_t kTile = kTileVectors * kLanes;
constexpr int64_t kTiles = 4; // tiles that use x while it is in the L2 cache
constexpr int64_t kPanelSteps = 128;

// Which codes dwords hold. kFields: codes in a byte of W (avx512.h).
template <Precision kPrecision, int kCodesInByte> struct Dwords {
  static constexpr int kCodes = kPrecision == Precision::int8 ? 4 : 2; // in a dword of x
  static constexpr int kCodeBits = 8 / kCodesInByte;
  static constexpr int kFields = 4 * kCodesInByte / kCodes; // dwords of x for a dword of W

  // Code `i` of dword `dword`.
  static constexpr int code_at(int dword, int i) {
    return dword / kFields * kCodes * kFields + dword % kFields + i * kFields;
  }
};

// ---- preparing x

// Columns that share an sx.
template <Precision kPrecision> constexpr SplitFormat format_of(int group_size) {
  return kPrecision == Precision::int8 ? split_format(kPrecision, group_size)
                                       : SplitFormat{kPanelSteps * 2, kSplitRange};
}

// Four rows of x: their dwords, then per group four sx and four sums of integers.
template <Precision kPrecision> struct Quad {
  static constexpr int kCodes = kPrecision == Precision::int8 ? 4 : 2;
  int64_t dwords, groups;

  explicit Quad(const PackedMatrix& w) : dwords(w.in_features / kCodes), groups(w.groups()) {}
  int64_t bytes() const { return (dwords + 2 * groups) * kQuad * 4; }
  const int32_t* codes(const std::byte* quad) const {
    return reinterpret_cast<const int32_t*>(quad);
  }
  const float* scales(const std::byte* quad) const {
    return reinterpret_cast<const float*>(quad) + dwords * kQuad;
  }
  const float* sums(const std::byte* quad) const { return scales(quad) + groups * kQuad; }
};

// Codes that one vector of dwords holds.
template <Precision kPrecision>
constexpr int kVectorCodes = kPrecision == Precision::int8 ? 64 : 32;

// The codes of a row at `codes` as 16 dwords, interleaved so that `transpose` of four rows puts
// dwords 4i to 4i + 3 of all four into vector i.
template <Precision kPrecision, int kCodesInByte>
Q4_INLINE __m512i dwords_of(const int16_t* codes) {
  using D = Dwords<kPrecision, kCodesInByte>;
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 32> order{};
    for (int i = 0; i < 32; ++i) {
      const int dword = i / D::kCodes;
      order[i] = int16_t(D::code_at(D::kCodes == 2 ? interleaved(dword) : dword, i % D::kCodes));
    }
    return order;
  }();
  const __m512i order = load(kOrder.data());
  if constexpr (kPrecision == Precision::fast) {
    return _mm512_permutexvar_epi16(order, load(codes));
  } else {
    const __m256i low = _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(order, load(codes)));
    const __m256i high = _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(order, load(codes + 32)));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_castps_si512(interleave(_mm512_castsi512_ps(both)));
  }
}

// Columns [first, last) of four rows, of which `count` exist.
template <Precision kPrecision, int kCodesInByte>
void prepare_columns(const PackedMatrix& w, const float* x, int64_t count, int64_t first,
                     int64_t last, std::byte* quad) {
  constexpr int64_t kMost = 512;
  constexpr int kStep = kVectorCodes<kPrecision>;
  const Quad<kPrecision> layout(w);
  alignas(64) int16_t codes[kQuad][kMost] = {};
  float scales[kQuad][kMost / 32] = {}, sums[kQuad][kMost / 32] = {};
  for (int64_t r = 0; r < count; ++r)
    round_columns(x + r * w.in_features + first, last - first, w.group_size,
                  format_of<kPrecision>(w.group_size), codes[r], scales[r], sums[r]);
  int32_t* out =
      const_cast<int32_t*>(layout.codes(quad)) + first / Quad<kPrecision>::kCodes * kQuad;
  for (int64_t k = 0; k < last - first; k += kStep) {
    __m512i v[kQuad];
    for (int r = 0; r < kQuad; ++r)
      v[r] = dwords_of<kPrecision, kCodesInByte>(codes[r] + k);
    transpose<kQuad>(v);
    // 32 columns at the end are half a vector of bytes.
    const int vectors = int(std::min<int64_t>(kStep, last - first - k) * kQuad / kStep);
    for (int i = 0; i < vectors; ++i, out += kLanes)
      store(out, v[i]);
  }
  for (int64_t g = first / w.group_size; g < last / w.group_size; ++g)
    for (int r = 0; r < kQuad; ++r) {
      const int64_t at = g * kQuad + r, from = g - first / w.group_size;
      const_cast<float*>(layout.scales(quad))[at] = scales[r][from];
      const_cast<float*>(layout.sums(quad))[at] = sums[r][from];
    }
}

// ---- expanding W

struct Scratch {
  alignas(64) __m512i panel[kPanelSteps * kTileVectors];
  alignas(64) float scales[kTiles][kLanes][kTile], biases[kTiles][kLanes][kTile]; // of 16 groups
  alignas(64) uint8_t unpacked[kLanes][kPanelSteps * 4];
};

Scratch& scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Up to 16 output features, those from `first` to `end`; the last in place of those that do not
// exist. Vector i of a transposition is feature interleaved(i), so that lanes come out in order.
struct Features {
  int64_t first, end;

  int64_t of(int i) const { return std::min<int64_t>(first + interleaved(i), end - 1); }
};

// Scales or biases of 16 groups from `group` on, zeros after a row's last.
void expand_groups(const PackedMatrix& w, const void* values, Features features, int64_t group,
                   float* out) {
  const int64_t groups = w.groups();
  const __mmask16 mask = first_lanes(groups - group);
  __m512i v[kLanes];
  for (int i = 0; i < kLanes; ++i)
    v[i] =
        _mm512_castps_si512(load_groups<false>(w, values, features.of(i) * groups + group, mask));
  transpose<kLanes>(v);
  for (int g = 0; g < kLanes; ++g)
    store(out + g * kTile, v[g]);
}

// Columns [k, k + columns) of 16 features as one of the three vectors of each step of a panel.
template <Precision kPrecision, int kCodesInByte>
void expand_codes(const PackedMatrix& w, Features features, int64_t k, int64_t columns, Scratch& s,
                  __m512i* out) {
  using D = Dwords<kPrecision, kCodesInByte>;
  const UnpackCodes unpack = unpack_codes_of(w.bits);
  const uint8_t* rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = w.weight + features.of(i) * w.row_stride() + k * w.bits / 8;
    if (unpack != nullptr) {
      unpack(rows[i], columns, s.unpacked[i]);
      rows[i] = s.unpacked[i];
    }
  }
  const __m512i mask = D::kCodes == 2 ? _mm512_set1_epi16((1 << D::kCodeBits) - 1)
                                      : _mm512_set1_epi8(char((1 << D::kCodeBits) - 1));
  for (int64_t at = 0; at < columns / kCodesInByte; at += 64) {
    const __mmask64 bytes = first_bytes(columns / kCodesInByte - at);
    __m512i v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      v[i] = _mm512_maskz_loadu_epi8(bytes, rows[i] + at);
    transpose<kLanes>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 4
      for (int field = 0; field < D::kFields; ++field, out += kTileVectors)
        store(out, _mm512_and_si512(_mm512_srli_epi32(v[i], field * D::kCodeBits), mask));
  }
}

// ---- tiles

// What a tile of 8 or 4 rows and up to 48 features works on: some groups.
struct Tile {
  const __m512i* panel;
  const int32_t* codes[2]; // of one or two quads
  const float* scales[2];
  const float* sums[2];
  const float* w_scales; // [groups][kTile]
  const float* w_biases;
  int64_t groups;
  int64_t steps; // per group
  int64_t rows, features;
  float* y;
  int64_t y_stride;
  bool accumulate;
};

template <Precision kPrecision>
Q4_INLINE Int32Vec add_products(Int32Vec sum, __m512i w, __m512i x) {
  if constexpr (kPrecision == Precision::int8)
    return multiply_add(sum, w, x);
  else
    return (Int32Vec)_mm512_dpwssd_epi32((__m512i)sum, w, x);
}

// Adds the sums of group g to `sums`.
template <Precision kPrecision, int kRows, int kVectors>
Q4_INLINE void add_group(const Tile& tile, int64_t g, const Int32Vec (&t)[kRows][kVectors],
                         float (&sums)[kRows][kTile]) {
#pragma GCC unroll 3
  for (int n = 0; n < kVectors; ++n) {
    const __m512 scale = _mm512_load_ps(tile.w_scales + g * kTile + kLanes * n);
    const __m512 bias = _mm512_load_ps(tile.w_biases + g * kTile + kLanes * n);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const int64_t at = g * kQuad + m % kQuad;
      const __m512 x_sum = _mm512_set1_ps(tile.sums[m / kQuad][at]);
      const __m512 dot = _mm512_cvtepi32_ps((__m512i)t[m][n]);
      __m512 sum = _mm512_load_ps(sums[m] + kLanes * n);
      if constexpr (kPrecision == Precision::int8) {
        const __m512 u = _mm512_fmadd_ps(dot, scale, _mm512_mul_ps(x_sum, bias));
        sum = _mm512_fmadd_ps(u, _mm512_set1_ps(tile.scales[m / kQuad][at]), sum);
      } else {
        sum = _mm512_fmadd_ps(x_sum, bias, _mm512_fmadd_ps(dot, scale, sum));
      }
      _mm512_store_ps(sums[m] + kLanes * n, sum);
    }
  }
}

template <Precision kPrecision, int kQuads, int kVectors> void run_tile(const Tile& tile) {
  constexpr int kRows = kQuads * kQuad;
  alignas(64) float sums[kRows][kTile];
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kVectors; ++n)
      _mm512_store_ps(sums[m] + kLanes * n, _mm512_setzero_ps());
  const __m512i* panel = tile.panel;
  const int32_t* x[2] = {tile.codes[0], tile.codes[1]};
  for (int64_t g = 0; g < tile.groups; ++g) {
    Int32Vec t[kRows][kVectors] = {};
    for (int64_t step = 0; step < tile.steps; ++step) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const __m512i code = _mm512_set1_epi32(x[m / kQuad][m % kQuad]);
#pragma GCC unroll 3
        for (int n = 0; n < kVectors; ++n)
          t[m][n] = add_products<kPrecision>(t[m][n], panel[n], code);
      }
      panel += kTileVectors;
      x[0] += kQuad;
      x[1] += kQuad;
    }
    add_group<kPrecision>(tile, g, t, sums);
  }
  for (int m = 0; m < tile.rows; ++m) {
    const __m512 scale = kPrecision == Precision::int8
                             ? _mm512_set1_ps(1)
                             : _mm512_set1_ps(tile.scales[m / kQuad][m % kQuad]);
    for (int n = 0; n < kVectors; ++n) {
      float* y = tile.y + m * tile.y_stride + kLanes * n;
      const __mmask16 lanes = first_lanes(tile.features - kLanes * n);
      const __m512 before = _mm512_maskz_loadu_ps(tile.accumulate ? lanes : 0, y);
      const __m512 sum = _mm512_load_ps(sums[m] + kLanes * n);
      _mm512_mask_storeu_ps(y, lanes, _mm512_fmadd_ps(sum, scale, before));
    }
  }
}

template <Precision kPrecision, int kQuads> void run_vectors(const Tile& tile) {
  switch ((tile.features + kLanes - 1) / kLanes) {
  case 1:
    return run_tile<kPrecision, kQuads, 1>(tile);
  case 2:
    return run_tile<kPrecision, kQuads, 2>(tile);
  default:
    return run_tile<kPrecision, kQuads, 3>(tile);
  }
}

// All rows of x times the panel.
template <Precision kPrecision>
void run_panel(const PackedMatrix& w, const std::byte* prepared, int64_t rows, int64_t column,
               Tile tile) {
  const Quad<kPrecision> layout(w);
  const int64_t group = column / w.group_size;
  float* y = tile.y;
  for (int64_t m = 0; m < rows; m += 2 * kQuad) {
    for (int q = 0; q < 2; ++q) { // the second may not exist
      const std::byte* quad = prepared + (m / kQuad + q) * layout.bytes();
      tile.codes[q] = layout.codes(quad) + column / Quad<kPrecision>::kCodes * kQuad;
      tile.scales[q] = layout.scales(quad) + group * kQuad;
      tile.sums[q] = layout.sums(quad) + group * kQuad;
    }
    tile.rows = std::min<int64_t>(2 * kQuad, rows - m);
    tile.y = y + m * w.out_features;
    tile.rows > kQuad ? run_vectors<kPrecision, 2>(tile) : run_vectors<kPrecision, 1>(tile);
  }
}

// Columns [k, last) of up to kTiles tiles; 16 groups at most.
template <Precision kPrecision>
void run_groups(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                int64_t begin, int64_t end, int64_t k, int64_t last) {
  constexpr int64_t kPanelColumns = kPanelSteps * Quad<kPrecision>::kCodes;
  const auto expand =
      w.bits == 4 ? expand_codes<kPrecision, fields_of(4)> : expand_codes<kPrecision, fields_of(8)>;
  Scratch& s = scratch();
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t tile = (n - begin) / kTile, lane = (n - begin) % kTile;
    const Features features{n, end};
    expand_groups(w, w.scales, features, k / w.group_size, &s.scales[tile][0][lane]);
    expand_groups(w, w.biases, features, k / w.group_size, &s.biases[tile][0][lane]);
  }
  for (int64_t column = k; column < last; column += kPanelColumns) {
    const int64_t columns = std::min(kPanelColumns, last - column);
    const int64_t group = (column - k) / w.group_size;
    for (int64_t first = begin; first < end; first += kTile) {
      Tile tile{};
      tile.panel = s.panel;
      tile.features = std::min(kTile, end - first);
      for (int64_t n = 0; n < tile.features; n += kLanes)
        expand(w, {first + n, end}, column, columns, s, s.panel + n / kLanes);
      tile.w_scales = s.scales[(first - begin) / kTile][group];
      tile.w_biases = s.biases[(first - begin) / kTile][group];
      tile.groups = columns / w.group_size;
      tile.steps = w.group_size / Quad<kPrecision>::kCodes;
      tile.y = y + first;
      tile.y_stride = w.out_features;
      tile.accumulate = column > 0;
      run_panel<kPrecision>(w, prepared, rows, column, tile);
    }
  }
}

} // namespace

template <Precision kPrecision>
void Avx512Gemm<kPrecision>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                     int64_t first, int64_t last, std::byte* prepared) {
  const int64_t bytes = Quad<kPrecision>(w).bytes();
  const auto columns = w.bits == 4 ? prepare_columns<kPrecision, fields_of(4)>
                                   : prepare_columns<kPrecision, fields_of(8)>;
  for (int64_t m = first; m < last; m += kQuad)
    for (int64_t k = 0; k < w.in_features; k += 512)
      columns(w, x + m * w.in_features, std::min<int64_t>(kQuad, rows - m), k,
              std::min<int64_t>(k + 512, w.in_features), prepared + m / kQuad * bytes);
}

template <Precision kPrecision>
size_t Avx512Gemm<kPrecision>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return round_up(rows, kQuad) / kQuad * Quad<kPrecision>(w).bytes();
}

template <Precision kPrecision>
void Avx512Gemm<kPrecision>::run(const PackedMatrix& w, const float*, const std::byte* prepared,
                                 int64_t rows, float* y, int64_t begin, int64_t end) {
  const int64_t step = int64_t(kLanes) * w.group_size;
  for (int64_t n = begin; n < end; n += kTiles * kTile)
    for (int64_t k = 0; k < w.in_features; k += step)
      run_groups<kPrecision>(w, prepared, rows, y, n, std::min(n + kTiles * kTile, end), k,
                             std::min(k + step, w.in_features));
}

template struct Avx512Gemm<Precision::fast>;
template struct Avx512Gemm<Precision::int8>;

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
