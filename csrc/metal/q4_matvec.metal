// y [R, N] = x [R, K] W^T + bias [N] for 1 to 8 rows: one pass over W whatever the number of rows.
// A simdgroup computes four output features; its lanes share K in turns of 512 weights. A row's
// result does not depend on the other rows, nor on how many there are.
#include "q4.h"

template <typename X, typename S, int kBits, int kGroup, int kRows>
kernel void q4_matvec(device const uchar* weight [[buffer(0)]],
                      device const S* scales [[buffer(1)]], device const S* biases [[buffer(2)]],
                      device const void* bias [[buffer(3)]], device const X* x [[buffer(4)]],
                      device typename Promoted<X, S>::type* y [[buffer(5)]],
                      constant MatvecArgs& args [[buffer(6)]],
                      uint3 threadgroup_at [[threadgroup_position_in_grid]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]]) {
  typedef typename Promoted<X, S>::type Y;
  const uint first = (threadgroup_at.x * kMatvecSimdgroups + simdgroup) * kMatvecFeatures;
  if (first >= args.out_features)
    return;
  uint features[kMatvecFeatures];
  for (int f = 0; f < kMatvecFeatures; ++f)
    features[f] = min(first + f, args.out_features - 1); // past the end: computed, not stored

  const Packed<kBits, kGroup, S> w = {weight, scales, biases, args.in_features};
  RowsOf<X> input = {x, args.in_features};
  float sums[kMatvecFeatures][kRows] = {};
  multiply(w, input, features, lane, sums);

  for (int f = 0; f < kMatvecFeatures; ++f)
    for (int m = 0; m < kRows; ++m) {
      const float sum = simd_sum(sums[f][m]);
      if (lane == 0 && first + f < args.out_features)
        y[ulong(args.out_features) * m + first + f] =
            Y(sum + load_any(bias, args.bias_dtype, first + f));
    }
}
