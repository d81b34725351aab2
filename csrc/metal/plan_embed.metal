// hidden [R, H] = the table's rows `ids`, in float32.
#include "plan_launch.h"
#include "q4_expand.h"

template <int kBits, int kGroup, typename S>
inline void copy_row(thread const Packed<kBits, kGroup, S>& w, uint row, uint k,
                     device float* out) {
  expand_rounded<float>(w, row, k, out);
}

template <typename T>
inline void copy_row(thread const Dense<T>& w, uint row, uint k, device float* out) {
  for (int j = 0; j < kCodesPerLane; ++j)
    out[j] = float(w.weight[ulong(w.in_features) * row + k + j]);
}

template <typename Matrix>
kernel void
plan_embed(device const void* weight [[buffer(0)]], device const void* scales [[buffer(1)]],
           device const void* biases [[buffer(2)]], device const float* unused [[buffer(3)]],
           device const long* ids [[buffer(4)]], device float* hidden [[buffer(5)]],
           constant EmbedArgs& args [[buffer(6)]],
           uint3 threadgroup_at [[threadgroup_position_in_grid]],
           uint thread_at [[thread_index_in_threadgroup]]) {
  const uint k = (threadgroup_at.x * kExpandThreads + thread_at) * kCodesPerLane;
  if (k >= args.in_features)
    return;
  const uint row = threadgroup_at.y;
  const long id = ids[row];
  device float* out = hidden + ulong(args.in_features) * row + k;
  if (id >= 0 && id < long(args.out_features))
    copy_row(Matrix::at(weight, scales, biases, args.in_features), uint(id), k, out);
  else // the host may not know the id, which another step chose: a wrong one must show
    for (int j = 0; j < kCodesPerLane; ++j)
      out[j] = NAN;
}
