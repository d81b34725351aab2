// Whole matrices to and from the packed layout, with the numbers of MLX's CPU backend bit for bit
// (on a device that keeps denormal numbers; torch_q4metal/reference.py has the formulas).
#include "q4_expand.h"

// out [N, K] = W.
template <typename S, typename Out, int kBits, int kGroup>
kernel void
q4_dequantize(device const uchar* weight [[buffer(0)]], device const S* scales [[buffer(1)]],
              device const S* biases [[buffer(2)]], device const void* unused [[buffer(3)]],
              device Out* out [[buffer(4)]], constant ExpandArgs& args [[buffer(5)]],
              uint3 threadgroup_at [[threadgroup_position_in_grid]],
              uint thread_at [[thread_index_in_threadgroup]]) {
  const uint k = (threadgroup_at.x * kExpandThreads + thread_at) * kCodesPerLane;
  if (k >= args.in_features)
    return;
  const uint row = threadgroup_at.y;
  const Packed<kBits, kGroup, S> w = {weight, scales, biases, args.in_features};
  expand_rounded<Out>(w, row, k, out + ulong(args.in_features) * row + k);
}

// One thread a group of w [N, K]: 32 codes are whole words, so threads share none.
template <typename W, int kBits, int kGroup>
kernel void q4_quantize(device const W* w [[buffer(0)]], device uint* weight [[buffer(1)]],
                        device W* scales [[buffer(2)]], device W* biases [[buffer(3)]],
                        constant QuantizeArgs& args [[buffer(4)]],
                        uint group [[thread_position_in_grid]]) {
  if (group >= args.groups)
    return;
  device const W* values = w + ulong(kGroup) * group;
  float low = float(values[0]), high = low;
  for (int i = 1; i < kGroup; ++i) {
    low = min(low, float(values[i]));
    high = max(high, float(values[i]));
  }
  const float levels = float((1 << kBits) - 1);
  const bool low_dominates = fabs(low) > fabs(high);
  float scale = max((high - low) / levels, 1e-7f);
  scale = low_dominates ? scale : -scale;
  const float edge = low_dominates ? low : high;
  const float edge_code = rint(edge / scale);
  float bias = 0.0f;
  if (edge_code != 0.0f) {
    scale = edge / edge_code;
    bias = edge;
  }
  scales[group] = W(scale);
  biases[group] = W(bias);
  device uint* words = weight + ulong(kGroup * kBits / 32) * group;
  ulong stream = 0; // codes that are not yet a whole word, lowest bits first
  int held = 0;
  for (int i = 0; i < kGroup; ++i) {
    const float code = rint((float(values[i]) - bias) / scale);
    stream |= ulong(clamp(code, 0.0f, levels)) << held;
    held += kBits;
    if (held >= 32) {
      *words++ = uint(stream);
      stream >>= 32;
      held -= 32;
    }
  }
}
