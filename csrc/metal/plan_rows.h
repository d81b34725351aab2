// What the decode plan's matrix steps share: RMSNorm folded into the product, and both passes over
// W of a pair of matrices in one.
#pragma once

#include "plan_launch.h"
#include "q4.h"

// Rows of gamma * hidden [kRows, K], and the sums of hidden's squares on the way: RMSNorm is
// y = (W (gamma * hidden)) / rms(hidden), so the division waits until the product is there. Every
// simdgroup sums the squares again: 8 % of its arithmetic, and nothing to pass between steps.
template <int kRows> struct NormedRows {
  device const float* hidden;
  device const float* gamma;
  uint in_features;
  float squares[kRows]; // of this lane, from zero

  void load(int row, uint k, thread float4 (&values)[4]) {
    for (int i = 0; i < 4; ++i) {
      const float4 h = load4(hidden + ulong(in_features) * row, k + 4 * i);
      values[i] = h * load4(gamma, k + 4 * i);
      squares[row] = fma(h.x, h.x, fma(h.y, h.y, fma(h.z, h.z, fma(h.w, h.w, squares[row]))));
    }
  }

  // 1 / rms of a row, once the whole simdgroup has loaded it once.
  float inverse_rms(int row, float eps) const {
    return rsqrt(simd_sum(squares[row]) / float(in_features) + eps);
  }
};

// multiply of two matrices by the same rows, which are loaded once.
template <int kRows, int kFeatures, typename A, typename B, typename Rows>
inline void multiply_both(thread const A& a, thread const B& b, thread Rows& rows,
                          thread const uint (&features)[kFeatures], uint lane,
                          thread float (&sums_a)[kFeatures][kRows],
                          thread float (&sums_b)[kFeatures][kRows]) {
  for (uint k = lane * kCodesPerLane; k < a.in_features; k += kSimdWidth * kCodesPerLane) {
    typename A::template Piece<kFeatures, kRows> piece_a;
    typename B::template Piece<kFeatures, kRows> piece_b;
    piece_a.fetch(a, features, k);
    piece_b.fetch(b, features, k);
    for (int m = 0; m < kRows; ++m) {
      float4 values[4];
      rows.load(m, k, values);
      const typename A::Input x_a(values);
      const typename B::Input x_b(values);
      for (int f = 0; f < kFeatures; ++f) {
        sums_a[f][m] = piece_a.add(f, x_a, sums_a[f][m]);
        sums_b[f][m] = piece_b.add(f, x_b, sums_b[f][m]);
      }
    }
  }
}

// first, first + 1, ...; past the end the last feature again, which is computed and not stored.
template <int kFeatures>
inline void consecutive(uint first, uint count, thread uint (&features)[kFeatures]) {
  for (int f = 0; f < kFeatures; ++f)
    features[f] = min(first + f, count - 1);
}

inline float bias_of(device const float* bias, uint has_bias, int matrix, uint feature) {
  return has_bias >> matrix & 1 ? bias[feature] : 0.0f;
}
