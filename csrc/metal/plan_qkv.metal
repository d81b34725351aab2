// RMSNorm, the q, k and v projections with their biases, RoPE, and the append to the KV cache, in
// one step. A simdgroup computes two RoPE pairs of a head: features i, i + 1 and the two that they
// are rotated with, half a head further on.
#include "plan_cache.h"
#include "plan_rows.h"

// Features of W RMSNorm(hidden) + bias, the same in all lanes.
template <int kRows, typename Matrix>
inline void project(thread const Matrix& w, device const float* bias, uint has_bias, int matrix,
                    device const float* gamma, device const float* hidden, float eps,
                    thread const uint (&features)[kMatvecFeatures], uint lane,
                    thread float (&y)[kMatvecFeatures][kRows]) {
  NormedRows<kRows> rows = {hidden, gamma, w.in_features};
  float sums[kMatvecFeatures][kRows] = {};
  multiply(w, rows, features, lane, sums);
  for (int m = 0; m < kRows; ++m) {
    const float inverse_rms = rows.inverse_rms(m, eps);
    for (int f = 0; f < kMatvecFeatures; ++f)
      y[f][m] =
          fma(simd_sum(sums[f][m]), inverse_rms, bias_of(bias, has_bias, matrix, features[f]));
  }
}

// Rotates the pair (a, b) of dimensions i and i + dim / 2; `rope` is cos [dim], then sin [dim],
// negative in its first half.
inline void rotate(device const float* rope, uint i, uint dim, thread float& a, thread float& b) {
  const uint j = i + dim / 2;
  const float rotated = fma(a, rope[i], b * rope[dim + i]);
  b = fma(b, rope[j], a * rope[dim + j]);
  a = rotated;
}

template <typename Q, typename K, typename V, typename T, int kRows>
kernel void
plan_qkv(device const void* q_weight [[buffer(0)]], device const void* q_scales [[buffer(1)]],
         device const void* q_biases [[buffer(2)]], device const float* q_bias [[buffer(3)]],
         device const void* k_weight [[buffer(4)]], device const void* k_scales [[buffer(5)]],
         device const void* k_biases [[buffer(6)]], device const float* k_bias [[buffer(7)]],
         device const void* v_weight [[buffer(8)]], device const void* v_scales [[buffer(9)]],
         device const void* v_biases [[buffer(10)]], device const float* v_bias [[buffer(11)]],
         device const float* gamma [[buffer(12)]], device const float* hidden [[buffer(13)]],
         device float* queries [[buffer(14)]], device const float* rope [[buffer(15)]],
         constant long* positions [[buffer(16)]], device const int* block_tables [[buffer(17)]],
         constant Slab* slabs [[buffer(18)]], constant QkvArgs& args [[buffer(19)]],
         uint3 threadgroup_at [[threadgroup_position_in_grid]],
         uint simdgroup [[simdgroup_index_in_threadgroup]],
         uint lane [[thread_index_in_simdgroup]]) {
  const uint dim = args.cache.head_dim, kv_heads = args.cache.kv_heads, units = dim / 4;
  const uint unit = threadgroup_at.x * kMatvecSimdgroups + simdgroup;
  if (unit >= (args.heads + 2 * kv_heads) * units)
    return;
  const uint any_head = unit / units, i = unit % units * 2;
  const int part = any_head < args.heads ? 0 : any_head < args.heads + kv_heads ? 1 : 2;
  const uint head = part == 0 ? any_head : (any_head - args.heads) % kv_heads;
  const uint at[kMatvecFeatures] = {i, i + 1, i + dim / 2, i + dim / 2 + 1};
  uint features[kMatvecFeatures];
  for (int f = 0; f < kMatvecFeatures; ++f)
    features[f] = head * dim + at[f];

  const uint in = args.matrix.in_features, has_bias = args.matrix.has_bias;
  const float eps = args.matrix.norm_eps;
  float y[kMatvecFeatures][kRows];
  if (part == 0)
    project(Q::at(q_weight, q_scales, q_biases, in), q_bias, has_bias, 0, gamma, hidden, eps,
            features, lane, y);
  else if (part == 1)
    project(K::at(k_weight, k_scales, k_biases, in), k_bias, has_bias, 1, gamma, hidden, eps,
            features, lane, y);
  else
    project(V::at(v_weight, v_scales, v_biases, in), v_bias, has_bias, 2, gamma, hidden, eps,
            features, lane, y);
  if (lane != 0)
    return;

  for (int m = 0; m < kRows; ++m) {
    if (part < 2)
      for (int f = 0; f < 2; ++f)
        rotate(rope + 2 * dim * m, i + f, dim, y[f][m], y[f + 2][m]);
    if (part == 0) {
      for (int f = 0; f < kMatvecFeatures; ++f)
        queries[ulong(args.heads * dim) * m + features[f]] = y[f][m];
    } else {
      const uint position = uint(positions[m]);
      device T* out = block_of<T>(slabs, block_tables, args.cache, part - 1, head, m,
                                  position / kBlockPositions) +
                      position % kBlockPositions * dim;
      for (int f = 0; f < kMatvecFeatures; ++f)
        out[at[f]] = T(y[f][m]);
    }
  }
}
