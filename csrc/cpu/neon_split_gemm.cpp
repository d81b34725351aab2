// The GEMMs with integer activations for NEON: sdot with one lane of x, four columns for four
// features. Fast goes over a group twice, for the high bytes of x16 and then for the low ones, with
// the sums times 256 in between: so two planes need no more registers than one.
#include "cpu_features.h"

#include "neon_split_gemm.h"

namespace q4metal::cpu {
namespace {

template <int kPlanes> struct DotTile : SplitTile {
  alignas(64) int8_t codes[kChunk * kTileColumns]; // [4 columns][feature][4]

  template <typename Width>
  void expand(const Width& width, const PackedMatrix& w, int64_t n, int64_t end, int64_t k,
              int64_t columns) {
    const TileOfW rows(w, n, end);
    expand_scales<Width>(rows, k, columns);
    for (int64_t run = 0; run < columns; run += 32)
      for (int first = 0; first < kTileColumns; first += 4) {
        uint8x16_t quads[8];
        quads_of_codes(width, rows, first, k + run, quads);
        for (int q = 0; q < 8; ++q)
          vst1q_s8(codes + (run + 4 * q) * kTileColumns + 4 * first, signed_codes<Width>(quads[q]));
      }
  }

  template <int kRows>
  void multiply(const SplitX<kPlanes>& x, int64_t m, int64_t k, int64_t columns, float* y,
                int64_t stride) const {
    for (int64_t b = 0; b * group_size < columns; ++b) {
      int32x4_t sums[kRows][4];
      unrolled<4 * kRows>(
          [&](int i) __attribute__((always_inline)) { sums[i / 4][i % 4] = vdupq_n_s32(0); });
      const int8_t* const packed = codes + b * group_size * kTileColumns;
      const int8_t* const row = x.codes(m, k + b * group_size);
      for (int plane = 0; plane < kPlanes; ++plane) {
        if (plane == 1)
          unrolled<4 * kRows>([&](int i) __attribute__((always_inline)) {
            sums[i / 4][i % 4] = vshlq_n_s32(sums[i / 4][i % 4], 8);
          });
        for (int64_t c = 0; c < group_size; c += 32)
          add_products<kRows>(packed + c * kTileColumns, row + c * kPlanes + 32 * plane,
                              x.layout.bytes(), sums);
      }
      const int64_t g = k / group_size + b;
      unrolled<4 * kRows>([&](int i) __attribute__((always_inline)) {
        const int r = i / 4;
        const std::byte* at = x.row(m + r);
        finish(b, 4 * (i % 4), sums[r][i % 4], x.layout.scales(at)[g], x.layout.sums(at)[g],
               y + r * stride);
      });
    }
  }

  // 32 columns, 16 features, one plane.
  template <int kRows>
  Q4_INLINE static void add_products(const int8_t* w, const int8_t* x, int64_t stride,
                                     int32x4_t (*sums)[4]) {
    unrolled<2>([&](int half) __attribute__((always_inline)) {
      int8x16_t row[kRows];
      unrolled<kRows>([&](int r) __attribute__((always_inline)) {
        row[r] = vld1q_s8(x + r * stride + 16 * half);
      });
      unrolled<4>([&]<typename Lane>(Lane) __attribute__((always_inline)) {
        const int8_t* step = w + (4 * half + Lane::value) * 4 * kTileColumns;
        unrolled<4>([&](int f) __attribute__((always_inline)) {
          const int8x16_t v = vld1q_s8(step + 16 * f);
          unrolled<kRows>([&](int r) __attribute__((always_inline)) {
            sums[r][f] = vdotq_laneq_s32(sums[r][f], v, row[r], Lane::value);
          });
        });
      });
    });
  }
};

} // namespace

template <Precision kPrecision>
void NeonGemm<kPrecision>::run(const PackedMatrix& w, const float*, const std::byte* prepared,
                               int64_t rows, float* y, int64_t begin, int64_t end) {
  static const bool i8mm = has_i8mm();
  if (i8mm)
    return neon_i8mm_gemm<kPrecision>(w, prepared, rows, y, begin, end);
  constexpr int kPlanes = planes_of(kPrecision);
  for_width(w, [&](const auto& width) {
    multiply_all<DotTile<kPlanes>>(w, width, SplitX<kPlanes>(w, prepared), rows, y, begin, end);
  });
}

template void NeonGemm<Precision::fast>::run(const PackedMatrix&, const float*, const std::byte*,
                                             int64_t, float*, int64_t, int64_t);
template void NeonGemm<Precision::int8>::run(const PackedMatrix&, const float*, const std::byte*,
                                             int64_t, float*, int64_t, int64_t);

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
