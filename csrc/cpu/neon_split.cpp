// The matvec with integer activations for NEON (split.h): dot products of signed bytes, sdot, which
// adds four products to each 32-bit lane. Codes fit signed bytes, those of 8 bits once 128 is taken
// off (the sum of x16 then comes back times 128, all in exact integers). Fast needs two of them per
// 16 codes, one for the high bytes of x16 and one for the low ones.
#include "split.h"

#include "neon.h" // from here on everything compiles for NEON with dot products

namespace q4metal::cpu {
namespace {

// By comparison of bits, as split_scale wants it.
float largest_magnitude(const float* x, int64_t count) {
  uint32x4_t largest = vdupq_n_u32(0);
  for (int64_t k = 0; k < count; k += 4)
    largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + k))));
  return std::bit_cast<float>(vmaxvq_u32(largest));
}

// 32 x16 as four vectors, and their sum.
int32_t round_32(const float* x, float inverse, bool even_odd, int16x8_t* out) {
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
  return vaddvq_s32(sum);
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

} // namespace

void neon_split_rows(Precision precision, const PackedMatrix& w, const float* x, int64_t first,
                     int64_t last, std::byte* prepared) {
  const SplitFormat format = split_format(precision, w.group_size);
  const int planes = split_planes(precision);
  const NeonSplitRow layout(w, planes);
  for (int64_t m = first; m < last; ++m) {
    const float* values = x + m * w.in_features;
    std::byte* row = prepared + m * layout.bytes();
    std::memset(row + layout.codes, 0, layout.bytes() - layout.codes);
    float* scales = const_cast<float*>(layout.scales(row));
    float* sums = const_cast<float*>(layout.sums(row));
    int32_t* offsets = const_cast<int32_t*>(layout.offsets(row));
    for (int64_t block = 0; block < w.in_features; block += format.block) {
      const int64_t end = std::min(block + format.block, w.in_features);
      const SplitScale s =
          split_scale(largest_magnitude(values + block, end - block), format.range);
      int32_t sum = 0;
      for (int64_t k = block; k < end; k += 32) {
        int16x8_t x16[4];
        sum += round_32(values + k, s.inverse, w.bits == 4, x16);
        store_planes(x16, planes, reinterpret_cast<int8_t*>(row) + k * planes);
        if ((k + 32) % w.group_size == 0) {
          const int64_t g = k / w.group_size;
          scales[g] = s.scale;
          sums[g] = float(sum) * s.scale;
          offsets[g] = w.bits == 8 ? 128 * sum : 0;
          sum = 0;
        }
      }
    }
  }
}

namespace {

// The sums of one group in four lanes each, for kRows rows of x at distance `stride`.
template <int kPlanes, int kRows, typename Width, typename Group>
Q4_INLINE void group_lanes(const Width& width, Group group, const uint8_t* packed, const int8_t* x,
                           int64_t stride, int32x4_t* out) {
  const int bits = Width::kBits != 0 ? Width::kBits : width.bits;
  int32x4_t sums[kRows][kPlanes];
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPlanes; ++p)
      sums[m][p] = vdupq_n_s32(0);
  for (int k = 0; k < group; k += 32, packed += 4 * bits, x += 32 * kPlanes) {
    int8x16_t codes[2];
    signed_codes(width, packed, codes);
    for (int m = 0; m < kRows; ++m)
      for (int p = 0; p < kPlanes; ++p)
        for (int i = 0; i < 2; ++i)
          sums[m][p] = vdotq_s32(sums[m][p], codes[i], vld1q_s8(x + m * stride + 32 * p + 16 * i));
  }
  for (int m = 0; m < kRows; ++m)
    out[m] = kPlanes == 1 ? sums[m][0] : vaddq_s32(vshlq_n_s32(sums[m][0], 8), sums[m][1]);
}

} // namespace
} // namespace q4metal::cpu
