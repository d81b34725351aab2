// Rows of x as the AVX-512 matvecs want them (avx512_split.h): a step of all rows after another.
#include "avx512_split.h"

namespace q4metal::cpu {
namespace {

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
void place_plane(const int8_t* bytes, int64_t rows, int plane, int field, __m512i* out) {
  __m512i v[S::kGroupLanes];
  for (int i = 0; i < S::kGroupLanes; ++i)
    v[i] = load(bytes + 64 * i);
  for (int pair = 0; pair < S::kPairs; ++pair) {
    const Halves h = halves<S::kGroupLanes>(v[2 * pair], v[2 * pair + 1]);
    __m512i* of_pair = out + pair * rows * S::kPairVectors;
    store(of_pair + S::at(plane, 0, field), h.low);
    store(of_pair + S::at(plane, 1, field), h.high);
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
          place_plane<S>(bytes + field * S::kColumns / 2, rows, plane, field,
                         out + m * S::kPairVectors);
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
  rows == 1 ? avx512_one_row<kPrecision>(w, prepared, y, begin, end)
            : avx512_several_rows<kPrecision>(w, prepared, rows, y, begin, end);
}

template struct Avx512Matvec<Precision::fast>;
template struct Avx512Matvec<Precision::int8>;

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
