// What the two GEMMs with integer activations share, the one with sdot and the one with smmla: rows
// of x as neon_split.cpp prepared them, and what becomes of the integer sums of a group. Both give
// the same bits.
#pragma once

#include "neon_split.h"

#include "neon_gemm.h" // from here on everything compiles for NEON with dot products

namespace q4metal::cpu {
namespace {

template <int kPlanes> struct SplitX {
  const std::byte* prepared;
  PreparedRow layout;

  SplitX(const PackedMatrix& w, const std::byte* prepared)
      : prepared(prepared), layout(w, kPlanes) {}
  const std::byte* row(int64_t m) const { return prepared + m * layout.bytes(); }
  const int8_t* codes(int64_t m, int64_t k) const {
    return reinterpret_cast<const int8_t*>(row(m)) + k * kPlanes;
  }
};

// A chunk of kTileColumns rows of W: their scales and biases, which a group of codes needs once its
// products are added up.
struct SplitTile {
  static constexpr int64_t kChunk = 512;

  int64_t group_size;
  alignas(16) float scales[kChunk / 32][kTileColumns];
  alignas(16) float offsets[kChunk / 32][kTileColumns]; // biases for codes less Width::kOffset

  template <typename Width> void expand_scales(const TileOfW& rows, int64_t k, int64_t columns) {
    group_size = rows.w.group_size;
    for (int64_t b = 0; b * group_size < columns; ++b)
      for (int first = 0; first < kTileColumns; first += 4) {
        const float32x4_t scale = rows.scales(first, k / group_size + b);
        const float32x4_t bias = rows.biases(first, k / group_size + b);
        vst1q_f32(scales[b] + first, scale);
        vst1q_f32(offsets[b] + first, vfmaq_n_f32(bias, scale, float(Width::kOffset)));
      }
  }

  // y += four features of group b; sx and sum are the group's of a row of x.
  Q4_INLINE void finish(int64_t b, int first, int32x4_t t, float sx, float sum, float* y) const {
    const float32x4_t factor = vmulq_n_f32(vld1q_f32(scales[b] + first), sx);
    float32x4_t v = vfmaq_n_f32(vld1q_f32(y + first), vld1q_f32(offsets[b] + first), sum);
    v = vfmaq_f32(v, vcvtq_f32_s32(t), factor);
    vst1q_f32(y + first, v);
  }
};

} // namespace
} // namespace q4metal::cpu
