// Reads memory and does nothing else worth mentioning: what matrix kernels are compared with.
#include "plan_launch.h"

using namespace q4metal::mps;

// sums [kProbeGroups * kProbeThreads / 32]: of the 32-bit words that a simdgroup has read.
kernel void read_probe(device const uint4* data [[buffer(0)]], device uint* sums [[buffer(1)]],
                       constant ProbeArgs& args [[buffer(2)]],
                       uint at [[thread_position_in_grid]],
                       uint lane [[thread_index_in_simdgroup]]) {
  uint4 sum = uint4(0);
  for (uint i = at; i < args.count; i += kProbeGroups * kProbeThreads)
    sum += data[i];
  const uint total = simd_sum(sum.x + sum.y + sum.z + sum.w);
  if (lane == 0)
    sums[at / kSimdWidth] = total;
}
