// The likeliest token of logits, of equals the first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace q4metal::cpu {

struct Likeliest {
  float logit = -std::numeric_limits<float>::infinity();
  int64_t token = 0;

  // NaN is never likelier.
  void join(const Likeliest& other) {
    if (other.logit > logit || (other.logit == logit && other.token < token))
      *this = other;
  }

  // Of tokens [begin, end).
  static Likeliest of(const float* logits, int64_t begin, int64_t end) {
    constexpr int64_t kWidth = 16; // maxima side by side, which the compiler puts into vectors
    float maxima[kWidth];
    std::fill_n(maxima, kWidth, -std::numeric_limits<float>::infinity());
    int64_t n = begin;
    for (; n + kWidth <= end; n += kWidth)
      for (int64_t i = 0; i < kWidth; ++i)
        maxima[i] = logits[n + i] > maxima[i] ? logits[n + i] : maxima[i];
    for (; n < end; ++n)
      maxima[0] = std::max(maxima[0], logits[n]);
    const float most = *std::max_element(maxima, maxima + kWidth);
    const float* found = std::find(logits + begin, logits + end, most);
    return {most, found == logits + end ? begin : found - logits};
  }
};

} // namespace q4metal::cpu
