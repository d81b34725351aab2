// out [rows, K] = W[ids]: rows of a packed table, rounded as MLX's CPU backend rounds.
#include "q4_expand.h"

template <typename S, typename Out, int kBits, int kGroup>
kernel void q4_embedding(device const uchar* weight [[buffer(0)]],
                         device const S* scales [[buffer(1)]], device const S* biases [[buffer(2)]],
                         device const void* ids [[buffer(3)]], device Out* out [[buffer(4)]],
                         constant ExpandArgs& args [[buffer(5)]],
                         uint3 threadgroup_at [[threadgroup_position_in_grid]],
                         uint thread_at [[thread_index_in_threadgroup]]) {
  const uint k = (threadgroup_at.x * kExpandThreads + thread_at) * kCodesPerLane;
  if (k >= args.in_features)
    return;
  const uint row = threadgroup_at.y;
  const long id = args.id_bytes == 8 ? static_cast<device const long*>(ids)[row]
                                     : long(static_cast<device const int*>(ids)[row]);
  device Out* to = out + ulong(args.in_features) * row + k;
  if (id < 0 || id >= long(args.out_features)) {
    // The host can't look at ids without waiting for the device: a wrong one must show.
    for (int i = 0; i < kCodesPerLane; ++i)
      to[i] = Out(NAN);
    return;
  }
  const Packed<kBits, kGroup, S> w = {weight, scales, biases, args.in_features};
  expand_rounded<Out>(w, uint(id), k, to);
}
