// Packed codes to numbers with the rounding of MLX's CPU backend.
#pragma once

#include "q4.h"

// A product that no compiler fuses with the sum that follows.
inline float rounded_product(float a, float b) { return fma(a, b, 0.0f); }

// Rounds to S after the product and after the sum where Out is the scales' type; otherwise
// computes in float32 and rounds once.
template <typename Out, typename S> struct Rounding {
  static float product(float scale, float code) { return rounded_product(scale, code); }
};
template <typename S> struct Rounding<S, S> {
  static float product(float scale, float code) { return float(S(rounded_product(scale, code))); }
};

// W[row, k .. k + kCodesPerLane) to `out`.
template <typename Out, int kBits, int kGroup, typename S>
inline void expand_rounded(thread const Packed<kBits, kGroup, S>& w, uint row, uint k,
                           device Out* out) {
  CodeStream<kBits, kCodesPerLane> stream;
  stream.read(w.codes(row, k));
  const float scale = float(w.scales[w.group(row, k)]);
  const float bias = float(w.biases[w.group(row, k)]);
  for (int j = 0; j < kCodesPerLane; ++j)
    out[j] = Out(Rounding<Out, S>::product(scale, float(stream.code(j))) + bias);
}
