// Draws a token: filters by top-p, min-p and top-k, then a temperature, as
// torch_q4metal/sampling.py does, without sorting. All filters keep the likeliest tokens, so
// together they are one smallest logit to keep; it is found digit by digit, from counts and masses
// of the tokens in sixteen buckets, and the draw is the largest of (logit / temperature + Gumbel
// noise).
#include "plan_choice.h"

Q4_CONSTANT int kDigitBits = 4;
Q4_CONSTANT int kBuckets = 16;

// Unsigned numbers in the order of the floats.
inline uint key_of(float value) {
  const uint bits = as_type<uint>(value + 0.0f); // no negative zero
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Philox4x32-10 (Salmon et al., 2011), the first of its four numbers.
inline uint philox(uint4 counter, uint2 key) {
  for (int round = 0; round < 10; ++round) {
    const uint high0 = mulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint high1 = mulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key += uint2(0x9E3779B9u, 0xBB67AE85u);
  }
  return counter.x;
}

// -log(-log(u)) of a u strictly between 0 and 1: 23 random bits and a half.
inline float gumbel(uint random) {
  const float u = (float(random >> 9) + 0.5f) / 8388608.0f;
  return -log(-log(u));
}

// What lies above the bucket that is looked into.
struct Above {
  uint count;
  float mass;
};

[[kernel, max_total_threads_per_threadgroup(kTokenThreads)]] void
plan_sample(device const float* logits [[buffer(0)]],
            constant Sampling* sampling [[buffer(1)]], constant long* positions [[buffer(2)]],
            device long* tokens [[buffer(3)]], constant ArgmaxArgs& args [[buffer(4)]],
            uint row [[threadgroup_position_in_grid]],
            uint thread_at [[thread_index_in_threadgroup]],
            uint simdgroup [[simdgroup_index_in_threadgroup]],
            uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float values_of[kSimdWidth];
  threadgroup uint indices_of[kSimdWidth];
  threadgroup uint counts_of[kSimdWidth * kBuckets];
  threadgroup float masses_of[kSimdWidth * kBuckets];
  threadgroup uint count_of[kBuckets];
  threadgroup float mass_of[kBuckets];
  const uint size = args.vocab_size;
  device const float* values = logits + ulong(size) * row;
  const float temperature = sampling[row].temperature, top_p = sampling[row].top_p;
  const float min_p = sampling[row].min_p;
  const uint top_k = sampling[row].top_k;

  Candidate best = nobody();
  for (uint i = thread_at; i < size; i += kTokenThreads)
    consider(values[i], i, best);
  best = best_of(best, values_of, indices_of, simdgroup, lane);
  if (temperature == 0.0f) {
    if (thread_at == 0)
      tokens[row] = long(best.index);
    return;
  }
  const float top = best.value;

  uint smallest = 0; // key of the smallest logit that is kept
  if (top_k > 0 || (top_p > 0.0f && top_p < 1.0f)) {
    float limit = INFINITY; // of the mass above a token that is kept; the first turn finds it
    const uint most = top_k > 0 ? top_k : 0xffffffffu;
    Above above = {0, 0.0f};
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
      const uint known = shift + kDigitBits == 32 ? 0 : ~0u << (shift + kDigitBits);
      uint counts[kBuckets] = {};
      float masses[kBuckets] = {};
      for (uint i = thread_at; i < size; i += kTokenThreads) {
        const uint key = key_of(values[i]);
        if ((key & known) != smallest)
          continue;
        const int digit = int(key >> shift & (kBuckets - 1));
        const float mass = exp(values[i] - top);
        for (int b = 0; b < kBuckets; ++b) {
          counts[b] += digit == b ? 1 : 0;
          masses[b] += digit == b ? mass : 0.0f;
        }
      }
      for (int b = 0; b < kBuckets; ++b) {
        const uint count = simd_sum(counts[b]);
        const float mass = simd_sum(masses[b]);
        if (lane == 0) {
          counts_of[simdgroup * kBuckets + b] = count;
          masses_of[simdgroup * kBuckets + b] = mass;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (thread_at < kBuckets) {
        uint count = 0;
        float mass = 0.0f;
        for (int s = 0; s < kSimdWidth; ++s) {
          count += counts_of[s * kBuckets + thread_at];
          mass += masses_of[s * kBuckets + thread_at];
        }
        count_of[thread_at] = count;
        mass_of[thread_at] = mass;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (shift == 32 - kDigitBits && top_p > 0.0f && top_p < 1.0f) {
        limit = 0.0f;
        for (int b = 0; b < kBuckets; ++b)
          limit += mass_of[b];
        limit *= top_p;
      }
      // The lowest bucket whose largest token is kept.
      Above next = above, chosen = above;
      uint digit = 0;
      for (int b = kBuckets - 1; b >= 0; --b) {
        if (count_of[b] == 0)
          continue;
        if (next.count < most && next.mass < limit) {
          chosen = next;
          digit = b;
        }
        next.count += count_of[b];
        next.mass += mass_of[b];
      }
      above = chosen;
      smallest |= digit << shift;
    }
  }

  const float floor_p = min_p > 0.0f ? top + log(min_p) : -INFINITY;
  const uint2 seed = uint2(sampling[row].seed_low, sampling[row].seed_high);
  const ulong position = ulong(positions[row]);
  Candidate drawn = nobody();
  for (uint i = thread_at; i < size; i += kTokenThreads) {
    if (key_of(values[i]) < smallest || values[i] < floor_p)
      continue;
    const uint4 counter = uint4(i, uint(position), uint(position >> 32), 0);
    consider((values[i] - top) / temperature + gumbel(philox(counter, seed)), i, drawn);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup); // values_of is read until here
  drawn = best_of(drawn, values_of, indices_of, simdgroup, lane);
  if (thread_at == 0)
    tokens[row] = long(drawn.index);
}
