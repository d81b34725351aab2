// The matvec with integer activations for NEON (split.h): dot products of signed bytes, sdot, which
// adds four products to each 32-bit lane. Codes fit signed bytes, those of 8 bits once 128 is taken
// off (the sum of x16 then comes back times 128, all in exact integers). Fast needs two of them per
// 16 codes, one for the high bytes of x16 and one for the low ones.
#include "neon_split.h"

namespace q4metal::cpu {
namespace {

// ---- x

// By comparison of bits, as split_scale wants it.
float largest_magnitude(const float* x, int64_t count) {
  uint32x4_t largest = vdupq_n_u32(0);
  for (int64_t k = 0; k < count; k += 4)
    largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + k))));
  return std::bit_cast<float>(vmaxvq_u32(largest));
}

// 32 x16 as four vectors, and their sum (modulo 2^32: it may overflow where x holds a NaN, and does
// not matter there).
uint32_t round_32(const float* x, float inverse, bool even_odd, int16x8_t* out) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < 4; ++i) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8 * i), inverse));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8 * i + 4), inverse));
    sum = vaddq_s32(sum, vaddq_s32(low, high));
    out[i] = vcombine_s16(vmovn_s32(low), vmovn_s32(high));
  }
  if (even_odd) {
    const int16x8_t odd[2] = {vuzp2q_s16(out[0], out[1]), vuzp2q_s16(out[2], out[3])};
    out[0] = vuzp1q_s16(out[0], out[1]);
    out[1] = vuzp1q_s16(out[2], out[3]);
    out[2] = odd[0];
    out[3] = odd[1];
  }
  return uint32_t(vaddvq_s32(sum));
}

void store_planes(const int16x8_t* x16, int planes, int8_t* out) {
  if (planes == 2) {
    for (int i = 0; i < 4; ++i)
      vst1_s8(out + 8 * i, vrshrn_n_s16(x16[i], 8));
    out += 32;
  }
  for (int i = 0; i < 4; ++i)
    vst1_s8(out + 8 * i, vmovn_s16(x16[i]));
}

template <Precision kPrecision>
void prepare_row(const PackedMatrix& w, const float* x, std::byte* row) {
  constexpr int kPlanes = planes_of(kPrecision);
  const SplitFormat format = split_format(kPrecision, w.group_size);
  const PreparedRow layout(w, kPlanes);
  std::memset(row + layout.codes, 0, layout.bytes() - layout.codes);
  float* scales = const_cast<float*>(layout.scales(row));
  float* sums = const_cast<float*>(layout.sums(row));
  int32_t* offsets = const_cast<int32_t*>(layout.offsets(row));
  for (int64_t block = 0; block < w.in_features; block += format.block) {
    const int64_t end = std::min(block + format.block, w.in_features);
    const SplitScale s = split_scale(largest_magnitude(x + block, end - block), format.range);
    uint32_t sum = 0;
    for (int64_t k = block; k < end; k += 32) {
      int16x8_t x16[4];
      sum += round_32(x + k, s.inverse, w.bits == 4, x16);
      store_planes(x16, kPlanes, reinterpret_cast<int8_t*>(row) + k * kPlanes);
      if ((k + 32) % w.group_size == 0) {
        const int64_t g = k / w.group_size;
        scales[g] = s.scale;
        sums[g] = float(int32_t(sum)) * s.scale;
        offsets[g] = w.bits == 8 ? int32_t(128 * sum) : 0;
        sum = 0;
      }
    }
  }
}

// ---- W

// The sums of one group in four lanes each, for kRows rows of x at distance `stride`.
template <int kPlanes, int kRows, typename Width, typename Group>
Q4_INLINE void group_lanes(const Width& width, Group group, const uint8_t* packed, const int8_t* x,
                           int64_t stride, int32x4_t* out) {
  int32x4_t sums[kRows][kPlanes];
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPlanes; ++p)
      sums[m][p] = vdupq_n_s32(0);
  for (int k = 0; k < group; k += 32, packed += width.run_bytes(), x += 32 * kPlanes) {
    int8x16_t codes[2];
    signed_codes(width, packed, codes);
    for (int m = 0; m < kRows; ++m)
      for (int p = 0; p < kPlanes; ++p)
        for (int i = 0; i < 2; ++i)
          sums[m][p] = vdotq_s32(sums[m][p], codes[i], vld1q_s8(x + m * stride + 32 * p + 16 * i));
  }
  for (int m = 0; m < kRows; ++m)
    out[m] =
        kPlanes == 1 ? sums[m][0] : vaddq_s32(vshlq_n_s32(sums[m][0], 8), sums[m][kPlanes - 1]);
}

// split_tree for 16 lanes in four vectors.
Q4_INLINE float tree(const float32x4_t* lanes) {
  const float32x4_t four = vaddq_f32(vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

// Rows of W times kRows rows of x.
template <int kPlanes, int kRows, typename Width, typename Group> struct RowProduct {
  const PackedMatrix& w;
  const Width& width;
  const Group group;
  const std::byte* x;
  const PreparedRow layout{w, kPlanes};
  const int64_t groups = w.groups();
  float32x4_t sums[kRows][4], offsets[kRows][4]; // the canonical order's 16 lanes

  // Groups [g, g + 4) of row n, of which `count` exist.
  Q4_INLINE void add_groups(int64_t n, int64_t g, int64_t count) {
    const int64_t group_bytes = group / 32 * width.run_bytes();
    const uint8_t* packed = w.weight + n * w.row_stride() + g * group_bytes;
    const auto* codes = reinterpret_cast<const int8_t*>(x) + g * group * kPlanes;
    int32x4_t lanes[4][kRows];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (j < count) {
        __builtin_prefetch(packed + kPrefetchAhead);
        group_lanes<kPlanes, kRows>(width, group, packed, codes, layout.bytes(), lanes[j]);
      } else {
        std::fill_n(lanes[j], kRows, vdupq_n_s32(0));
      }
      packed += group_bytes;
      codes += group * kPlanes;
    }
    const float32x4_t scale = load_groups(w, w.scales, n * groups + g, count);
    const float32x4_t bias = load_groups(w, w.biases, n * groups + g, count);
    const int quarter = int(g / 4 % 4);
    for (int m = 0; m < kRows; ++m) {
      const std::byte* row = x + m * layout.bytes();
      int32x4_t t =
          vpaddq_s32(vpaddq_s32(lanes[0][m], lanes[1][m]), vpaddq_s32(lanes[2][m], lanes[3][m]));
      if constexpr (Width::kOffset != 0)
        t = vaddq_s32(t, vld1q_s32(layout.offsets(row) + g));
      const float32x4_t factor = vmulq_f32(scale, vld1q_f32(layout.scales(row) + g));
      sums[m][quarter] = vfmaq_f32(sums[m][quarter], vcvtq_f32_s32(t), factor);
      offsets[m][quarter] = vfmaq_f32(offsets[m][quarter], bias, vld1q_f32(layout.sums(row) + g));
    }
  }

  void run(float* y, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int m = 0; m < kRows; ++m)
        for (int quarter = 0; quarter < 4; ++quarter)
          sums[m][quarter] = offsets[m][quarter] = vdupq_n_f32(0);
      int64_t g = 0;
      for (; g + 4 <= groups; g += 4)
        add_groups(n, g, 4);
      if (g < groups)
        add_groups(n, g, groups - g);
      for (int m = 0; m < kRows; ++m)
        y[m * w.out_features + n] = tree(sums[m]) + tree(offsets[m]);
    }
  }
};

} // namespace

template <Precision kPrecision>
size_t NeonMatvec<kPrecision>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return rows * PreparedRow(w, planes_of(kPrecision)).bytes();
}

template <Precision kPrecision>
void NeonMatvec<kPrecision>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                     std::byte* prepared) {
  NeonGemm<kPrecision>::prepare(w, x, rows, 0, rows, prepared);
}

template <Precision kPrecision>
void NeonMatvec<kPrecision>::run(const PackedMatrix& w, const std::byte* prepared, int64_t rows,
                                 float* y, int64_t begin, int64_t end) {
  constexpr int kPlanes = planes_of(kPrecision);
  const int64_t stride = PreparedRow(w, kPlanes).bytes();
  for_format(w, [&]<typename Width, typename Group>(const Width& width, Group group) {
    for_matvec_tiles(rows, begin, end, [&]<int kRows>(int64_t m, int64_t first, int64_t last) {
      RowProduct<kPlanes, kRows, Width, Group>{w, width, group, prepared + m * stride}.run(
          y + m * w.out_features, first, last);
    });
  });
}

template <Precision kPrecision>
size_t NeonGemm<kPrecision>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return NeonMatvec<kPrecision>::prepared_bytes(w, rows);
}

template <Precision kPrecision>
void NeonGemm<kPrecision>::prepare(const PackedMatrix& w, const float* x, int64_t, int64_t first,
                                   int64_t last, std::byte* prepared) {
  const int64_t stride = PreparedRow(w, planes_of(kPrecision)).bytes();
  for (int64_t m = first; m < last; ++m)
    prepare_row<kPrecision>(w, x + m * w.in_features, prepared + m * stride);
}

template size_t NeonGemm<Precision::fast>::prepared_bytes(const PackedMatrix&, int64_t);
template size_t NeonGemm<Precision::int8>::prepared_bytes(const PackedMatrix&, int64_t);
template void NeonGemm<Precision::fast>::prepare(const PackedMatrix&, const float*, int64_t,
                                                 int64_t, int64_t, std::byte*);
template void NeonGemm<Precision::int8>::prepare(const PackedMatrix&, const float*, int64_t,
                                                 int64_t, int64_t, std::byte*);
template struct NeonMatvec<Precision::fast>;
template struct NeonMatvec<Precision::int8>;

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
