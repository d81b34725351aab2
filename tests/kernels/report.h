// Counts checks, keeps the names of those that failed, and compares results.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace q4metal::cpu::tests {

struct Report {
  int64_t cases = 0, checks = 0, failed = 0;
  std::vector<std::string> first_failures;

  void check(bool passed, const std::string& what) {
    ++checks;
    if (passed)
      return;
    ++failed;
    constexpr size_t kNamed = 8;
    if (first_failures.size() < kNamed)
      first_failures.push_back(what);
  }
};

// The same bits; any NaN equals any other, whose payload instruction sets choose differently.
inline bool same_bits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (a != a && b != b);
}

inline bool same_bits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!same_bits(a[i], b[i]))
      return false;
  return true;
}

inline std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

} // namespace q4metal::cpu::tests
