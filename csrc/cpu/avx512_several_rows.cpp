// The matvec of 2 to 8 rows of x: some output features at a time, so that a vector of x is loaded
// once for all of them and a pair of W is unpacked once for all rows.
#include <array>
#include <bit>

#include "avx512_split.h"

namespace q4metal::cpu {
namespace {

constexpr int kMostRows = int(kMaxMatvecRows);

// Output features that share what is loaded of x: of 8 rows and K = 3584 that is 59 KB, more than
// L1 holds.
constexpr int kFeatures = 4;

// Sums of a step's pairs that wait for their neighbours: by level of the tree, row and feature.
template <typename S> struct Waiting {
  static constexpr int kLevels = std::countr_zero(unsigned(S::kPairs));
  __m512i sums[kLevels][kMostRows][kFeatures];
};

// Where features are read.
struct Features {
  const uint8_t* codes[kFeatures];
  int64_t groups[kFeatures];
};

// The sum of pair kPair of a row and feature goes up the tree as far as it can: to the sum of the
// step if it is the last pair.
template <typename S, int kPair, int kLevel = 0>
Q4_INLINE __m512i join_pairs(__m512i sum, Waiting<S>& waiting, int64_t m, int n) {
  if constexpr ((kPair >> kLevel & 1) != 0) {
    const Halves h = halves<(S::kPairs >> kLevel)>(waiting.sums[kLevel][m][n], sum);
    return join_pairs<S, kPair, kLevel + 1>(_mm512_add_epi32(h.low, h.high), waiting, m, n);
  } else {
    if constexpr (kPair + 1 < S::kPairs)
      waiting.sums[kLevel][m][n] = sum;
    return sum;
  }
}

// A pair of vectors of W for each feature.
template <typename S, int kPair, typename Use>
Q4_INLINE void multiply_pair(const Halves (&codes)[kFeatures], const __m512i* x, int64_t rows,
                             Waiting<S>& waiting, const Use& use) {
  __m512i fields[kFeatures][2][S::kFields];
#pragma GCC unroll 4
  for (int n = 0; n < kFeatures; ++n)
#pragma GCC unroll 2
    for (int field = 0; field < S::kFields; ++field) {
      fields[n][0][field] = field_of<S::kFields>(codes[n].low, field);
      fields[n][1][field] = field_of<S::kFields>(codes[n].high, field);
    }
  for (int64_t m = 0; m < rows; ++m) {
    const __m512i* row = x + (kPair * rows + m) * S::kPairVectors;
    Int32Vec parts[S::kPlanes][kFeatures] = {};
#pragma GCC unroll 2
    for (int plane = 0; plane < S::kPlanes; ++plane)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
        for (int field = 0; field < S::kFields; ++field) {
          const __m512i code = load(row + S::at(plane, half, field));
#pragma GCC unroll 4
          for (int n = 0; n < kFeatures; ++n)
            parts[plane][n] = multiply_add(parts[plane][n], fields[n][half][field], code);
        }
#pragma GCC unroll 4
    for (int n = 0; n < kFeatures; ++n) {
      const Int32Vec sum =
          S::kPlanes == 1 ? parts[0][n] : (parts[0][n] << 8) + parts[S::kPlanes - 1][n];
      const __m512i joined = join_pairs<S, kPair>((__m512i)sum, waiting, m, n);
      if constexpr (kPair + 1 == S::kPairs)
        use(m, n, joined);
    }
  }
}

// Adds 16 groups of each feature, or those of the tail, to the sums of every row.
template <typename S, bool kAll, bool kDirect>
Q4_INLINE void add_rows(const PackedMatrix& w, const Features& features, const RowShape& shape,
                        const __m512i* x, int64_t rows, Sums (*sums)[kMostRows]) {
  const __mmask16 mask = kAll ? 0xffff : shape.tail_lanes;
  __m512 scales[kFeatures], biases[kFeatures];
#pragma GCC unroll 4
  for (int n = 0; n < kFeatures; ++n) {
    prefetch_groups(w, features.groups[n]);
    scales[n] = load_groups<true>(w, w.scales, features.groups[n], mask);
    biases[n] = load_groups<true>(w, w.biases, features.groups[n], mask);
  }
  const auto* floats = reinterpret_cast<const float*>(x + rows * S::kCodeVectors);
  const auto use = [&](int64_t m, int n, __m512i products) __attribute__((always_inline)) {
    add_groups(products, scales[n], biases[n], floats + 2 * kLanes * m, sums[n][m]);
  };
  Waiting<S> waiting;
  const auto pair = [&]<int kPair>() __attribute__((always_inline)) {
    const bool is_whole = kAll || kPair < shape.full_pairs;
    Halves codes[kFeatures];
#pragma GCC unroll 4
    for (int n = 0; n < kFeatures; ++n) {
      const uint8_t* p = features.codes[n] + 128 * kPair;
      if constexpr (kDirect)
        prefetch_lines(p + kPrefetchAhead, 128);
      const __mmask64 low = kPair == shape.full_pairs ? shape.tail_low : 0;
      const __mmask64 high = kPair == shape.full_pairs ? shape.tail_high : 0;
      codes[n] = is_whole ? halves<S::kGroupLanes>(load(p), load(p + 64))
                          : halves<S::kGroupLanes>(_mm512_maskz_loadu_epi8(low, p),
                                                   _mm512_maskz_loadu_epi8(high, p + 64));
    }
    multiply_pair<S, kPair>(codes, x, rows, waiting, use);
  };
  [&]<int... kPair>(std::integer_sequence<int, kPair...>) __attribute__((always_inline)) {
    (pair.template operator()<kPair>(), ...);
  }(std::make_integer_sequence<int, S::kPairs>());
}

template <typename S, bool kDirect>
void run_several(const PackedMatrix w, const __m512i* x, int64_t rows, float* y, int64_t begin,
                 int64_t end) {
  std::array<RowCodes<S, kDirect>, kFeatures> codes = {};
  for (auto& each : codes)
    each = RowCodes<S, kDirect>(w);
  const RowShape shape = RowShape::of<S>(w);
  for (int64_t n = begin; n < end; n += kFeatures) {
    Sums sums[kFeatures][kMostRows];
    for (auto& of_feature : sums)
      std::fill_n(of_feature, rows, Sums{_mm512_setzero_ps(), _mm512_setzero_ps()});
    Features features;
    const auto step = [&](int64_t first, int64_t groups) __attribute__((always_inline)) {
      for (int i = 0; i < kFeatures; ++i) {
        const int64_t feature = std::min(n + i, end - 1); // the last again where none is left
        features.groups[i] = feature * shape.groups + first;
        features.codes[i] = codes[i].step(w.weight + feature * shape.stride +
                                              first / kLanes * codes[i].step_bytes(),
                                          groups * S::kGroupColumns);
      }
      return x + first / kLanes * rows * S::kVectors;
    };
    for (int64_t g = 0; g < shape.groups - shape.tail; g += kLanes) {
      const __m512i* at = step(g, kLanes);
      add_rows<S, true, kDirect>(w, features, shape, at, rows, sums);
    }
    if (shape.tail != 0) {
      const __m512i* at = step(shape.groups - shape.tail, shape.tail);
      add_rows<S, false, kDirect>(w, features, shape, at, rows, sums);
    }
    for (int i = 0; i < std::min<int64_t>(kFeatures, end - n); ++i) {
      std::fill(sums[i] + rows, sums[i] + kMostRows, sums[i][0]);
      alignas(32) float results[kMostRows];
      _mm256_store_ps(results, finish(sums[i]));
      for (int64_t m = 0; m < rows; ++m)
        y[m * w.out_features + n + i] = results[m];
    }
  }
}

} // namespace

template <Precision kPrecision>
void avx512_several_rows(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                         int64_t begin, int64_t end) {
  for_step<kPrecision>(w, [&]<typename S, bool kDirect>() {
    run_several<S, kDirect>(w, reinterpret_cast<const __m512i*>(prepared), rows, y, begin, end);
  });
}

template void avx512_several_rows<Precision::fast>(const PackedMatrix&, const std::byte*, int64_t,
                                                   float*, int64_t, int64_t);
template void avx512_several_rows<Precision::int8>(const PackedMatrix&, const std::byte*, int64_t,
                                                   float*, int64_t, int64_t);

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
