// The matvec of one row of x. All sums of a row of W stay in registers: 108 instructions for 512
// bytes of 4 bits and group size 64.
//
// Rows of W follow one another, unless x is longer than what L1 holds beside them (32 KB on Zen 4):
// then a step of x meets four rows of W, so that x comes from L2 for every fourth of them. K =
// 18944, 41 KB of x in fast precision: 11.3 GB/s of weights -> 28 (one thread of Zen 4, from
// memory), 22 -> 33 (two; a plain read does 34).
#include "avx512_split.h"

namespace q4metal::cpu {
namespace {

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
        sum = multiply_add(sum, fields[half][field],
                           x[pair * S::kPairVectors + S::at(plane, half, field)]);
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
Q4_INLINE void add_step(const PackedMatrix& w, const uint8_t* codes, int64_t group, Ahead ahead,
                        const RowShape& shape, const __m512i* x, Sums& sums) {
  const auto products = [&](int pair) __attribute__((always_inline)) {
    const uint8_t* p = codes + 128 * pair;
    if (!kAll && pair >= shape.full_pairs) {
      if (pair > shape.full_pairs || shape.tail_low == 0)
        return _mm512_setzero_si512();
      if constexpr (kDirect) {
        prefetch_line(p + ahead.bytes);
        if (shape.tail_high != 0)
          prefetch_line(p + ahead.bytes + 64);
      }
      return pair_products<S>(
          halves<S::kGroupLanes>(_mm512_maskz_loadu_epi8(shape.tail_low, p),
                                 _mm512_maskz_loadu_epi8(shape.tail_high, p + 64)),
          pair, x);
    }
    if constexpr (kDirect) {
      prefetch_line(p + ahead.bytes);
      prefetch_line(p + ahead.bytes + 64);
    }
    return pair_products<S>(halves<S::kGroupLanes>(load(p), load(p + 64)), pair, x);
  };
  const __m512i t = tree_of_pairs<1, S::kGroupLanes / 2>(products, 0);
  const __mmask16 mask = kAll ? 0xffff : shape.tail_lanes;
  prefetch_groups(w, group, ahead);
  add_groups(t, load_groups<true>(w, w.scales, group, mask),
             load_groups<true>(w, w.biases, group, mask),
             reinterpret_cast<const float*>(x + S::kCodeVectors), sums);
}

// The sums of rows [n, n + kTogether) of W.
template <typename S, bool kDirect, int kTogether>
Q4_INLINE void row_sums(const PackedMatrix& w, RowCodes<S, kDirect>& codes, const RowShape& shape,
                        const __m512i* x, int64_t n, Sums* sums) {
  // Rows that are read together are short streams; the next ones follow after all of them.
  const Ahead ahead =
      kTogether == 1 ? Ahead{} : Ahead{kTogether * shape.stride, kTogether * shape.groups};
  const uint8_t* packed = w.weight + n * shape.stride;
  int64_t group = n * shape.groups;
  Sums of_row[kTogether];
#pragma GCC unroll 4
  for (Sums& each : of_row)
    each = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto add = [&]<bool kAll>(int64_t columns) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i)
      add_step<S, kAll, kDirect>(w, codes.step(packed + i * shape.stride, columns, ahead),
                                 group + i * shape.groups, ahead, shape, x, of_row[i]);
  };
  for (const int64_t last = group + shape.groups - shape.tail; group < last; group += kLanes) {
    add.template operator()<true>(S::kColumns);
    packed += codes.step_bytes();
    x += S::kVectors;
  }
  if (shape.tail != 0)
    add.template operator()<false>(shape.tail * S::kGroupColumns);
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i)
    sums[i] = of_row[i];
}

// `w` by value: no store to y changes it, so its fields stay in registers.
template <typename S, bool kDirect, int kTogether>
void run_one(const PackedMatrix w, const __m512i* x, float* y, int64_t begin, int64_t end) {
  RowCodes<S, kDirect> codes(w);
  const RowShape shape = RowShape::of<S>(w);
  Sums sums[8];
  for (int64_t n = begin; n < end; n += 8) {
    const int64_t count = std::min<int64_t>(8, end - n);
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether)
      row_sums<S, kDirect, kTogether>(w, codes, shape, x, n + i, sums + i);
    for (; i < count; ++i)
      row_sums<S, kDirect, 1>(w, codes, shape, x, n + i, sums + i);
    std::fill(sums + count, sums + 8, sums[0]);
    _mm256_mask_storeu_ps(y + n, __mmask8(first_lanes(count)), finish(sums));
  }
}

} // namespace

template <Precision kPrecision>
void avx512_one_row(const PackedMatrix& w, const std::byte* prepared, float* y, int64_t begin,
                    int64_t end) {
  for_step<kPrecision>(w, [&]<typename S, bool kDirect>() {
    constexpr int64_t kCached = 20 << 10; // bytes of x; all 19 KB of K = 8960 do better at once
    const int64_t bytes = w.in_features / S::kColumns * S::kVectors * int64_t(sizeof(__m512i));
    (bytes > kCached
         ? run_one<S, kDirect, 4>
         : run_one<S, kDirect, 1>)(w, reinterpret_cast<const __m512i*>(prepared), y, begin, end);
  });
}

template void avx512_one_row<Precision::fast>(const PackedMatrix&, const std::byte*, float*,
                                              int64_t, int64_t);
template void avx512_one_row<Precision::int8>(const PackedMatrix&, const std::byte*, float*,
                                              int64_t, int64_t);

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
