// The fast and the int8 matvec for AVX-512 VNNI: integer activations (split.h), 16 groups a step.
//
// x16 is two planes of bytes, high and low; vpdpbusd multiplies codes with either, and the sum of
// the high plane is shifted before the low plane joins it. int8 has one plane. Bytes of 4 bits hold
// codes 2j and 2j + 1, so each plane is split into even and odd k.
//
// One row of x: two vectors of W are shuffled so that a group's halves lie on top of each other
// (`halves`), which saves one zero, one shift and a level of the tree for two shuffles. The sums of
// 16 groups then become one vector: 108 instructions for 512 bytes of 4 bits and group size 64.
//
// Several rows: 16 groups are transposed so that each lane holds one group. That leaves the
// products, and one conversion and two fma for 16 groups and row.
//
// Lanes are in the interleaved order of avx512.h throughout, so the scales and the last tree are
// too.
#include "prefetch.h"
#include "split.h"

#include <utility>

#include "avx512.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

constexpr int kMostRows = int(kMaxMatvecRows);

// How a step of 16 groups is read and prepared.
template <int kFieldCount, int kGroup, Precision kPrecision> struct Step {
  static constexpr int kFields = kFieldCount;
  static constexpr int kPlanes = kPrecision == Precision::int8 ? 1 : 2;
  static constexpr int kGroupColumns = kGroup;
  static constexpr int kGroupBytes = kGroup / kFields;
  static constexpr int kGroupLanes = kGroupBytes / 4;
  static constexpr int64_t kColumns = kLanes * kGroup;
  static constexpr int64_t kStepBytes = kLanes * kGroupBytes; // as read: codes of 4 or 8 bits
  static constexpr int kPairs = kGroupLanes / 2;              // pairs of vectors of W

  // Vectors of a prepared row: its codes, then sx and float(sum of codes) * sx of 16 groups.
  static constexpr int kCodeVectors = kGroupLanes * kFields * kPlanes;
  static constexpr int kVectors = kCodeVectors + 2;

  // Which of its codes multiply which of W, for one row: `half` of pair `pair`.
  static constexpr int pair_at(int pair, int plane, int half, int field) {
    return ((pair * kPlanes + plane) * 2 + half) * kFields + field;
  }
};

// ---- preparing x

// Bytes of one plane and field in the order of W's bytes, from codes in natural order.
template <int kFields>
void pick_plane(const int16_t* codes, int64_t columns, bool high, int8_t* out) {
  alignas(64) static constexpr auto kEvenOdd = [] {
    std::array<int16_t, 32> order{};
    for (int i = 0; i < 32; ++i)
      order[i] = int16_t(kFields == 1 ? i : i % 16 * 2 + i / 16);
    return order;
  }();
  for (int64_t k = 0; k < columns; k += 32) {
    __m512i v = load(codes + k);
    if (high)
      v = _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8);
    const __m256i bytes = _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(load(kEvenOdd.data()), v));
    if constexpr (kFields == 1) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), bytes);
    } else {
      auto* even = reinterpret_cast<__m128i*>(out + k / 2);
      auto* odd = reinterpret_cast<__m128i*>(out + columns / 2 + k / 2);
      _mm_storeu_si128(even, _mm256_castsi256_si128(bytes));
      _mm_storeu_si128(odd, _mm256_extracti128_si256(bytes, 1));
    }
  }
}

// Puts one plane and field of a row into the order of W's vectors after their shuffles.
template <typename S>
void place_plane(const int8_t* bytes, int64_t rows, int64_t row, int plane, int field,
                 __m512i* out) {
  __m512i v[S::kGroupLanes];
  for (int i = 0; i < S::kGroupLanes; ++i)
    v[i] = load(bytes + 64 * i);
  if (rows == 1) {
    for (int pair = 0; pair < S::kPairs; ++pair) {
      const Halves h = halves<S::kGroupLanes>(v[2 * pair], v[2 * pair + 1]);
      store(out + S::pair_at(pair, plane, 0, field), h.low);
      store(out + S::pair_at(pair, plane, 1, field), h.high);
    }
  } else {
    transpose<S::kGroupLanes>(v);
    for (int lane = 0; lane < S::kGroupLanes; ++lane)
      store(out + ((lane * rows + row) * S::kPlanes + plane) * S::kFields + field, v[lane]);
  }
}

template <Precision kPrecision, int kFields, int kGroup>
void prepare_format(const PackedMatrix& w, const float* x, int64_t rows, __m512i* out) {
  using S = Step<kFields, kGroup, kPrecision>;
  for (int64_t first = 0; first < w.in_features; first += S::kColumns) {
    const int64_t columns = std::min(S::kColumns, w.in_features - first);
    for (int64_t m = 0; m < rows; ++m) {
      alignas(64) int16_t codes[S::kColumns];
      alignas(64) float scales[kLanes] = {}, sums[kLanes] = {};
      std::fill(codes + columns, codes + S::kColumns, int16_t(0));
      round_columns(x + m * w.in_features + first, columns, kGroup,
                    split_format(kPrecision, kGroup), codes, scales, sums);
      for (int plane = 0; plane < S::kPlanes; ++plane) {
        alignas(64) int8_t bytes[S::kColumns];
        pick_plane<S::kFields>(codes, S::kColumns, plane + 1 < S::kPlanes, bytes);
        for (int field = 0; field < S::kFields; ++field)
          place_plane<S>(bytes + field * S::kColumns / 2, rows, m, plane, field, out);
      }
      __m512i* floats = out + rows * S::kCodeVectors + 2 * m;
      const __m512 scale = _mm512_load_ps(scales);
      const __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums), scale);
      store(floats, _mm512_castps_si512(interleave(scale)));
      store(floats + 1, _mm512_castps_si512(interleave(sum)));
    }
    out += rows * S::kVectors;
  }
}

// ---- sums

// For the scales and biases of groups some rows ahead: two streams beside that of the codes.
Q4_INLINE void prefetch_groups(const PackedMatrix& w, int64_t group) {
  constexpr int64_t kGroupsAhead = 512;
  const int64_t ahead = (group + kGroupsAhead) * int64_t(size_of(w.scales_dtype));
  prefetch_line(static_cast<const std::byte*>(w.scales) + ahead);
  prefetch_line(static_cast<const std::byte*>(w.biases) + ahead);
}

// Codes of field 0 or 1.
template <int kFields> Q4_INLINE __m512i field_of(__m512i bytes, int field) {
  if constexpr (kFields == 1)
    return bytes;
  const __m512i shifted = field == 0 ? bytes : _mm512_srli_epi16(bytes, 4);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(15));
}

// What is worked out once for all rows of W: a division a row took as long as ten vectors. The tail
// is the last step, of fewer than 16 groups.
struct RowShape {
  int64_t groups, stride; // bytes of W
  int64_t tail;           // groups
  __mmask16 tail_lanes;
  int64_t full_pairs;            // pairs of vectors of W in the tail
  __mmask64 tail_low, tail_high; // bytes of the two vectors of the pair after those

  template <typename S> static RowShape of(const PackedMatrix& w) {
    const int64_t groups = w.groups(), tail = groups % kLanes, bytes = tail * S::kGroupBytes;
    return {groups,
            w.row_stride(),
            tail,
            first_lanes(tail),
            bytes / 128,
            first_bytes(bytes % 128),
            first_bytes(bytes % 128 - 64)};
  }
};

// The lanes' sums of products of a pair of vectors.
template <typename S> Q4_INLINE __m512i pair_products(Halves codes, int pair, const __m512i* x) {
  const __m512i fields[2][2] = {
      {field_of<S::kFields>(codes.low, 0), field_of<S::kFields>(codes.low, 1)},
      {field_of<S::kFields>(codes.high, 0), field_of<S::kFields>(codes.high, 1)}};
  Int32Vec sum = {};
#pragma GCC unroll 2
  for (int plane = 0; plane < S::kPlanes; ++plane) {
    if (plane == 1)
      sum <<= 8;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
      for (int field = 0; field < S::kFields; ++field)
        sum = multiply_add(sum, fields[half][field], x[S::pair_at(pair, plane, half, field)]);
  }
  return (__m512i)sum;
}

// Sums of pairs from `first` on, so many that one vector of kCount lanes a group holds them.
template <int kCount, int kPairLanes, typename F>
Q4_INLINE __m512i tree_of_pairs(const F& products, int first) {
  if constexpr (kCount == kPairLanes) {
    return products(first);
  } else {
    constexpr int kPairs = kPairLanes / (2 * kCount);
    const __m512i a = tree_of_pairs<2 * kCount, kPairLanes>(products, first);
    const __m512i b = tree_of_pairs<2 * kCount, kPairLanes>(products, first + kPairs);
    const Halves h = halves<2 * kCount>(a, b);
    return _mm512_add_epi32(h.low, h.high);
  }
}

// Adds 16 groups, or those of the tail.
template <typename S, bool kAll, bool kDirect>
Q4_INLINE void add_step(const PackedMatrix& w, const uint8_t* codes, int64_t group,
                        const RowShape& shape, const __m512i* x, Sums& sums) {
  const auto products = [&](int pair) __attribute__((always_inline)) {
    const uint8_t* p = codes + 128 * pair;
    if (!kAll && pair >= shape.full_pairs) {
      if (pair > shape.full_pairs || shape.tail_low == 0)
        return _mm512_setzero_si512();
      if constexpr (kDirect) {
        prefetch_line(p + kPrefetchAhead);
        if (shape.tail_high != 0)
          prefetch_line(p + kPrefetchAhead + 64);
      }
      return pair_products<S>(
          halves<S::kGroupLanes>(_mm512_maskz_loadu_epi8(shape.tail_low, p),
                                 _mm512_maskz_loadu_epi8(shape.tail_high, p + 64)),
          pair, x);
    }
    if constexpr (kDirect) {
      prefetch_line(p + kPrefetchAhead);
      prefetch_line(p + kPrefetchAhead + 64);
    }
    return pair_products<S>(halves<S::kGroupLanes>(load(p), load(p + 64)), pair, x);
  };
  const __m512i t = tree_of_pairs<1, S::kGroupLanes / 2>(products, 0);
  const __mmask16 mask = kAll ? 0xffff : shape.tail_lanes;
  prefetch_groups(w, group);
  const __m512 scale = load_groups<true>(w, w.scales, group, mask);
  const __m512 bias = load_groups<true>(w, w.biases, group, mask);
  const auto* floats = reinterpret_cast<const float*>(x + S::kCodeVectors);
  const __m512 factor = _mm512_mul_ps(scale, _mm512_load_ps(floats));
  sums.acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), factor, sums.acc);
  sums.off = _mm512_fmadd_ps(bias, _mm512_load_ps(floats + kLanes), sums.off);
}

// ---- one row of x

// The codes of a row, a step at a time: in place, or unpacked to bytes with zeros after the last.
template <typename S, bool kDirect> class RowCodes {
public:
  explicit RowCodes(const PackedMatrix& w)
      : unpack_(unpack_codes_of(w.bits)), step_bytes_(S::kColumns * w.bits / 8) {}

  Q4_INLINE const uint8_t* step(const uint8_t* packed, int64_t columns) {
    if constexpr (kDirect)
      return packed;
    prefetch_lines(packed + kPrefetchAhead, step_bytes_);
    if (columns < S::kColumns)
      std::memset(bytes_, 0, sizeof bytes_);
    unpack_(packed, std::min(columns, S::kColumns), bytes_);
    return bytes_;
  }
  Q4_INLINE int64_t step_bytes() const { return kDirect ? S::kStepBytes : step_bytes_; }

private:
  UnpackCodes unpack_;
  int64_t step_bytes_; // packed
  alignas(64) uint8_t bytes_[kDirect ? 64 : S::kStepBytes];
};

template <typename S, bool kDirect>
Q4_INLINE Sums row_sums(const PackedMatrix& w, RowCodes<S, kDirect>& codes, const RowShape& shape,
                        const __m512i* x, int64_t n) {
  const uint8_t* packed = w.weight + n * shape.stride;
  int64_t group = n * shape.groups;
  Sums sums = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (const int64_t last = group + shape.groups - shape.tail; group < last; group += kLanes) {
    add_step<S, true, kDirect>(w, codes.step(packed, S::kColumns), group, shape, x, sums);
    packed += codes.step_bytes();
    x += S::kVectors;
  }
  if (shape.tail != 0)
    add_step<S, false, kDirect>(w, codes.step(packed, shape.tail * S::kGroupColumns), group, shape,
                                x, sums);
  return sums;
}

// `w` by value: no store to y changes it, so its fields stay in registers.
template <typename S, bool kDirect>
void run_one(const PackedMatrix w, const __m512i* x, float* y, int64_t begin, int64_t end) {
  RowCodes<S, kDirect> codes(w);
  const RowShape shape = RowShape::of<S>(w);
  Sums sums[8];
  for (int64_t n = begin; n < end; n += 8) {
    const int64_t count = std::min<int64_t>(8, end - n);
    for (int64_t i = 0; i < count; ++i)
      sums[i] = row_sums<S, kDirect>(w, codes, shape, x, n + i);
    std::fill(sums + count, sums + 8, sums[0]);
    _mm256_mask_storeu_ps(y + n, __mmask8(first_lanes(count)), finish(sums));
  }
}

// ---- several rows of x

// Rows of x that are prepared side by side, 16 groups of them.
struct RowsStep {
  const __m512i* codes; // [lanes of a group][rows][planes][fields]
  const float* floats;  // [rows]: 16 sx, 16 float(sum of codes) * sx
};

// Output features that share what is loaded of x: of 8 rows and K = 3584 that is 57 KB, more than
// L1 holds.
constexpr int kFeatures = 2;

// 16 groups of some features.
template <int kLanesOfGroup> struct FeaturesStep {
  __m512i codes[kFeatures][kLanesOfGroup]; // transposed to one vector per lane of a group
  __m512 scales[kFeatures], biases[kFeatures];
};

// Adds 16 groups of each feature for kRows of the `rows` rows of x, from `first` on. Sums stay in
// registers: 16 of them, more than are under way at once.
template <typename S, int kRows>
void add_rows(const FeaturesStep<S::kGroupLanes>& w, RowsStep x, int64_t rows, int64_t first,
              Sums (&sums)[kFeatures][kMostRows]) {
  constexpr int kFields = S::kFields, kPlanes = S::kPlanes;
  Int32Vec parts[kFeatures][kPlanes][kRows] = {};
  const __m512i* codes = x.codes + first * kPlanes * kFields;
  for (int lane = 0; lane < S::kGroupLanes; ++lane) {
    __m512i fields[kFeatures][kFields];
#pragma GCC unroll 2
    for (int n = 0; n < kFeatures; ++n)
#pragma GCC unroll 2
      for (int field = 0; field < kFields; ++field)
        fields[n][field] = field_of<kFields>(w.codes[n][lane], field);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int plane = 0; plane < kPlanes; ++plane)
#pragma GCC unroll 2
        for (int field = 0; field < kFields; ++field) {
          const __m512i code = load(codes + (m * kPlanes + plane) * kFields + field);
#pragma GCC unroll 2
          for (int n = 0; n < kFeatures; ++n)
            parts[n][plane][m] = multiply_add(parts[n][plane][m], fields[n][field], code);
        }
    codes += rows * kPlanes * kFields;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const __m512 scale = _mm512_load_ps(x.floats + 32 * (first + m));
    const __m512 sum = _mm512_load_ps(x.floats + 32 * (first + m) + 16);
#pragma GCC unroll 2
    for (int n = 0; n < kFeatures; ++n) {
      const Int32Vec t =
          kPlanes == 1 ? parts[n][0][m] : (parts[n][0][m] << 8) + parts[n][kPlanes - 1][m];
      Sums& of = sums[n][first + m];
      of.acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)t), _mm512_mul_ps(w.scales[n], scale),
                               of.acc);
      of.off = _mm512_fmadd_ps(w.biases[n], sum, of.off);
    }
  }
}

// As many rows at once as there are sums for.
template <typename S>
void add_all_rows(const FeaturesStep<S::kGroupLanes>& w, RowsStep x, int64_t rows,
                  Sums (&sums)[kFeatures][kMostRows]) {
  constexpr int kAtOnce = 8 / S::kPlanes;
  for (int64_t first = 0; first < rows; first += kAtOnce)
    [&]<int... kLess>(std::integer_sequence<int, kLess...>) {
      const int64_t count = std::min<int64_t>(kAtOnce, rows - first);
      ((count == kLess + 1 ? add_rows<S, kLess + 1>(w, x, rows, first, sums) : void()), ...);
    }(std::make_integer_sequence<int, kAtOnce>());
}

// The codes of `count` groups, up to 16, transposed.
template <typename S> Q4_INLINE void load_step(const uint8_t* p, int64_t count, __m512i* v) {
  for (int i = 0; i < S::kGroupLanes; ++i)
    v[i] = count == kLanes
               ? load(p + 64 * i)
               : _mm512_maskz_loadu_epi8(first_bytes(count * S::kGroupBytes - 64 * i), p + 64 * i);
  transpose<S::kGroupLanes>(v);
}

template <typename S, bool kDirect>
void run_several(const PackedMatrix w, const __m512i* x, int64_t rows, float* y, int64_t begin,
                 int64_t end) {
  const int64_t groups = w.groups();
  RowCodes<S, kDirect> codes(w);
  for (int64_t n = begin; n < end; n += kFeatures) {
    const __m512i* step = x;
    Sums sums[kFeatures][kMostRows] = {};
    for (int64_t g = 0; g < groups; g += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, groups - g);
      const __mmask16 mask = first_lanes(count);
      FeaturesStep<S::kGroupLanes> features;
      for (int i = 0; i < kFeatures; ++i) {
        const int64_t feature = std::min(n + i, end - 1); // the last twice where one is left over
        const uint8_t* p =
            codes.step(w.weight + feature * w.row_stride() + g / kLanes * codes.step_bytes(),
                       count * S::kGroupColumns);
        load_step<S>(p, count, features.codes[i]);
        if constexpr (kDirect)
          prefetch_lines(p + kPrefetchAhead, count * S::kGroupBytes);
        const int64_t group = feature * groups + g;
        prefetch_groups(w, group);
        features.scales[i] = load_groups<true>(w, w.scales, group, mask);
        features.biases[i] = load_groups<true>(w, w.biases, group, mask);
      }
      add_all_rows<S>(features,
                      {step, reinterpret_cast<const float*>(step + rows * S::kCodeVectors)}, rows,
                      sums);
      step += rows * S::kVectors;
    }
    for (int i = 0; i < std::min<int64_t>(kFeatures, end - n); ++i) {
      alignas(32) float results[kMostRows];
      _mm256_store_ps(results, finish(sums[i]));
      for (int64_t m = 0; m < rows; ++m)
        y[m * w.out_features + n + i] = results[m];
    }
  }
}

template <typename S, bool kDirect>
void run_rows(const PackedMatrix& w, const __m512i* x, int64_t rows, float* y, int64_t begin,
              int64_t end) {
  rows == 1 ? run_one<S, kDirect>(w, x, y, begin, end)
            : run_several<S, kDirect>(w, x, rows, y, begin, end);
}

} // namespace

template <Precision kPrecision>
void Avx512Matvec<kPrecision>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                       std::byte* prepared) {
  for_format(w, [&]<int kFields, int kGroup>() {
    prepare_format<kPrecision, kFields, kGroup>(w, x, rows, reinterpret_cast<__m512i*>(prepared));
  });
}

template <Precision kPrecision>
size_t Avx512Matvec<kPrecision>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  size_t bytes = 0;
  for_format(w, [&]<int kFields, int kGroup>() {
    using S = Step<kFields, kGroup, kPrecision>;
    bytes = rows * (round_up(w.in_features, S::kColumns) / S::kColumns) * S::kVectors * 64;
  });
  return bytes;
}

template <Precision kPrecision>
void Avx512Matvec<kPrecision>::run(const PackedMatrix& w, const std::byte* prepared, int64_t rows,
                                   float* y, int64_t begin, int64_t end) {
  const auto* x = reinterpret_cast<const __m512i*>(prepared);
  for_format(w, [&]<int kFields, int kGroup>() {
    using S = Step<kFields, kGroup, kPrecision>;
    if constexpr (kFields == 1) {
      if (w.bits != 8)
        return run_rows<S, false>(w, x, rows, y, begin, end);
    }
    run_rows<S, true>(w, x, rows, y, begin, end);
  });
}

template struct Avx512Matvec<Precision::fast>;
template struct Avx512Matvec<Precision::int8>;

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
