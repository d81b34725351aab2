// Draws a token out of logits, with the filters and in the order of torch_q4metal/sampling.py.
#pragma once

#include <cstdint>

namespace q4metal::cpu {

struct Sampling {
  double temperature;          // above 0; of the tokens that the filters leave
  double top_p = 0, min_p = 0; // of untempered probabilities; 0 and, for top_p, 1: all
  int64_t top_k = 0;           // 0: all; of equal logits at its end, those of the lowest ids
};

// One of `size` tokens for `random` in [0, 1): as many of its values lead to a token as that has
// probability. -1 if no token can be drawn: all logits are -inf, or one is NaN or +inf.
int64_t draw_token(const float* logits, int64_t size, const Sampling& sampling, double random);

// Random numbers of a text's position, one for each token.
struct Noise {
  uint64_t seed, position;
};

// The same with a device's random numbers (csrc/metal/plan_sample.metal): the largest of
// logit / temperature + Gumbel noise. Of equal logits at top_k's end, all may be drawn.
int64_t draw_token(const float* logits, int64_t size, const Sampling& sampling, const Noise& noise);

} // namespace q4metal::cpu
