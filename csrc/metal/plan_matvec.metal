// The decode plan's steps that are one product, or two, with what surrounds it: output and down
// projection with the residual, gate and up with norm and SwiGLU, norm and head.
#include "plan_rows.h"

// hidden [R, N] += x [R, K] W^T + bias.
template <typename Matrix, int kRows>
kernel void plan_residual(
    device const void* weight [[buffer(0)]], device const void* scales [[buffer(1)]],
    device const void* biases [[buffer(2)]], device const float* bias [[buffer(3)]],
    device const float* x [[buffer(4)]], device float* hidden [[buffer(5)]],
    constant MatrixArgs& args [[buffer(6)]], uint3 threadgroup_at [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint first = (threadgroup_at.x * kMatvecSimdgroups + simdgroup) * kMatvecFeatures;
  if (first >= args.out_features)
    return;
  uint features[kMatvecFeatures];
  consecutive(first, args.out_features, features);
  const Matrix w = Matrix::at(weight, scales, biases, args.in_features);
  RowsOf<float> rows = {x, args.in_features};
  float sums[kMatvecFeatures][kRows] = {};
  multiply(w, rows, features, lane, sums);
  for (int f = 0; f < kMatvecFeatures; ++f)
    for (int m = 0; m < kRows; ++m) {
      const float sum = simd_sum(sums[f][m]);
      if (lane == 0 && first + f < args.out_features)
        hidden[ulong(args.out_features) * m + first + f] +=
            sum + bias_of(bias, args.has_bias, 0, first + f);
    }
}

// activation [R, N] = silu(gate) * up of RMSNorm(hidden [R, K]).
template <typename Gate, typename Up, int kRows>
kernel void plan_gate_up(
    device const void* gate_weight [[buffer(0)]], device const void* gate_scales [[buffer(1)]],
    device const void* gate_biases [[buffer(2)]], device const float* gate_bias [[buffer(3)]],
    device const void* up_weight [[buffer(4)]], device const void* up_scales [[buffer(5)]],
    device const void* up_biases [[buffer(6)]], device const float* up_bias [[buffer(7)]],
    device const float* gamma [[buffer(8)]], device const float* hidden [[buffer(9)]],
    device float* activation [[buffer(10)]], constant MatrixArgs& args [[buffer(11)]],
    uint3 threadgroup_at [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint first = (threadgroup_at.x * kMatvecSimdgroups + simdgroup) * kPairFeatures;
  if (first >= args.out_features)
    return;
  uint features[kPairFeatures];
  consecutive(first, args.out_features, features);
  const Gate gate = Gate::at(gate_weight, gate_scales, gate_biases, args.in_features);
  const Up up = Up::at(up_weight, up_scales, up_biases, args.in_features);
  NormedRows<kRows> rows = {hidden, gamma, args.in_features};
  float gates[kPairFeatures][kRows] = {}, ups[kPairFeatures][kRows] = {};
  multiply_both(gate, up, rows, features, lane, gates, ups);
  for (int m = 0; m < kRows; ++m) {
    const float inverse_rms = rows.inverse_rms(m, args.norm_eps);
    for (int f = 0; f < kPairFeatures; ++f) {
      const float g = fma(simd_sum(gates[f][m]), inverse_rms,
                          bias_of(gate_bias, args.has_bias, 0, features[f]));
      const float u =
          fma(simd_sum(ups[f][m]), inverse_rms, bias_of(up_bias, args.has_bias, 1, features[f]));
      if (lane == 0 && first + f < args.out_features)
        activation[ulong(args.out_features) * m + first + f] = g / (1.0f + exp(-g)) * u;
    }
  }
}

// logits [R, N] = W RMSNorm(hidden [R, K]) + bias.
template <typename Matrix, int kRows>
kernel void
plan_head(device const void* weight [[buffer(0)]], device const void* scales [[buffer(1)]],
          device const void* biases [[buffer(2)]], device const float* bias [[buffer(3)]],
          device const float* gamma [[buffer(4)]], device const float* hidden [[buffer(5)]],
          device float* logits [[buffer(6)]], constant MatrixArgs& args [[buffer(7)]],
          uint3 threadgroup_at [[threadgroup_position_in_grid]],
          uint simdgroup [[simdgroup_index_in_threadgroup]],
          uint lane [[thread_index_in_simdgroup]]) {
  const uint first = (threadgroup_at.x * kMatvecSimdgroups + simdgroup) * kMatvecFeatures;
  if (first >= args.out_features)
    return;
  uint features[kMatvecFeatures];
  consecutive(first, args.out_features, features);
  const Matrix w = Matrix::at(weight, scales, biases, args.in_features);
  NormedRows<kRows> rows = {hidden, gamma, args.in_features};
  float sums[kMatvecFeatures][kRows] = {};
  multiply(w, rows, features, lane, sums);
  for (int m = 0; m < kRows; ++m) {
    const float inverse_rms = rows.inverse_rms(m, args.norm_eps);
    for (int f = 0; f < kMatvecFeatures; ++f) {
      const float y =
          fma(simd_sum(sums[f][m]), inverse_rms, bias_of(bias, args.has_bias, 0, features[f]));
      if (lane == 0 && first + f < args.out_features)
        logits[ulong(args.out_features) * m + first + f] = y;
    }
  }
}
