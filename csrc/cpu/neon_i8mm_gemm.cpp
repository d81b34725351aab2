// The GEMMs with integer activations for NEON with the matrix instructions of i8mm (M2 and later,
// Neoverse V1 and later): smmla multiplies two rows of eight bytes with two others, twice the
// products of sdot. The integer sums are the same, and so are all bits of the result.
#define Q4_I8MM
#include "neon_split_gemm.h"

namespace q4metal::cpu {
namespace {

template <int kPlanes> struct MatrixTile : SplitTile {
  static constexpr int kPairs = kTileColumns / 2;

  alignas(64) int8_t codes[kChunk * kTileColumns]; // [8 columns][pair of features][2][8]

  template <typename Width>
  void expand(const Width& width, const PackedMatrix& w, int64_t n, int64_t end, int64_t k,
              int64_t columns) {
    const TileOfW rows(w, n, end);
    expand_scales<Width>(rows, k, columns);
    for (int64_t run = 0; run < columns; run += 32)
      for (int pair = 0; pair < kPairs; ++pair) {
        int8x16_t first[2], second[2];
        signed_codes(width, rows.codes(2 * pair, k + run), first);
        signed_codes(width, rows.codes(2 * pair + 1, k + run), second);
        int8_t* out = codes + run * kTileColumns + 16 * pair;
        for (int half = 0; half < 2; ++half, out += 32 * kPairs) {
          vst1q_s8(out, low_eights(first[half], second[half]));
          vst1q_s8(out + 16 * kPairs, high_eights(first[half], second[half]));
        }
      }
  }

  template <int kRows>
  void multiply(const SplitX<kPlanes>& x, int64_t m, int64_t k, int64_t columns, float* y,
                int64_t stride) const {
    constexpr int kSums = (kRows + 1) / 2 * kPairs; // [pair of rows][pair of features]
    for (int64_t b = 0; b * group_size < columns; ++b) {
      int32x4_t sums[kSums]; // (row 0: features 0, 1)(row 1: features 0, 1)
      unrolled<kSums>([&](int i) __attribute__((always_inline)) { sums[i] = vdupq_n_s32(0); });
      const int8_t* const packed = codes + b * group_size * kTileColumns;
      const int8_t* const row = x.codes(m, k + b * group_size);
      for (int plane = 0; plane < kPlanes; ++plane) {
        if (plane == 1)
          unrolled<kSums>(
              [&](int i) __attribute__((always_inline)) { sums[i] = vshlq_n_s32(sums[i], 8); });
        for (int64_t c = 0; c < group_size; c += 32)
          for (int half = 0; half < 2; ++half)
            add_products<kRows>(packed + (c + 16 * half) * kTileColumns,
                                row + c * kPlanes + 32 * plane + 16 * half, x.layout.bytes(), sums);
      }
      const int64_t g = k / group_size + b;
      unrolled<4 * kRows>([&](int i) __attribute__((always_inline)) {
        const int r = i / 4, f = i % 4;
        const int32x4_t* pair = sums + r / 2 * kPairs + 2 * f;
        const int64x2_t two = vreinterpretq_s64_s32(pair[0]), next = vreinterpretq_s64_s32(pair[1]);
        const int64x2_t four = r % 2 == 0 ? vzip1q_s64(two, next) : vzip2q_s64(two, next);
        const std::byte* at = x.row(m + r);
        finish(b, 4 * f, vreinterpretq_s32_s64(four), x.layout.scales(at)[g], x.layout.sums(at)[g],
               y + r * stride);
      });
    }
  }

  // 16 columns, 16 features, one plane. A row without a partner is its own.
  template <int kRows>
  Q4_INLINE static void add_products(const int8_t* w, const int8_t* x, int64_t stride,
                                     int32x4_t* sums) {
    constexpr int kRowPairs = (kRows + 1) / 2;
    int8x16_t rows[kRowPairs][2];
    unrolled<kRowPairs>([&](int r) __attribute__((always_inline)) {
      const int8x16_t first = vld1q_s8(x + 2 * r * stride);
      const int8x16_t second = vld1q_s8(x + std::min(2 * r + 1, kRows - 1) * stride);
      rows[r][0] = low_eights(first, second);
      rows[r][1] = high_eights(first, second);
    });
    unrolled<2 * kPairs>([&](int i) __attribute__((always_inline)) {
      const int8x16_t v = vld1q_s8(w + 16 * i);
      unrolled<kRowPairs>([&](int r) __attribute__((always_inline)) {
        int32x4_t& sum = sums[r * kPairs + i % kPairs];
        sum = vmmlaq_s32(sum, rows[r][i / kPairs], v);
      });
    });
  }

  Q4_INLINE static int8x16_t low_eights(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
  }
  Q4_INLINE static int8x16_t high_eights(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
  }
};

} // namespace

template <Precision kPrecision>
void neon_i8mm_gemm(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                    int64_t begin, int64_t end) {
  constexpr int kPlanes = planes_of(kPrecision);
  for_width(w, [&](const auto& width) {
    multiply_all<MatrixTile<kPlanes>>(w, width, SplitX<kPlanes>(w, prepared), rows, y, begin, end);
  });
}

template void neon_i8mm_gemm<Precision::fast>(const PackedMatrix&, const std::byte*, int64_t,
                                              float*, int64_t, int64_t);
template void neon_i8mm_gemm<Precision::int8>(const PackedMatrix&, const std::byte*, int64_t,
                                              float*, int64_t, int64_t);

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
