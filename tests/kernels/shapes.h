// Which shapes are tested: every pair of choices (format with K, K with N, ...) in some case, which
// takes about as many cases as the two longest lists have pairs, instead of their whole product.
#pragma once

#include <array>
#include <set>
#include <utility>
#include <vector>

#include "operands.h"

namespace q4metal::cpu::tests {

struct Case {
  Shape shape;
  int matvec_rows, gemm_rows;
};

struct Choices {
  std::vector<int64_t> in_features, out_features;
  std::vector<int> matvec_rows, gemm_rows;
};

inline std::vector<Case> pairwise_cases(const Choices& choices) {
  static constexpr int kBits[] = {2, 3, 4, 5, 6, 8}, kGroups[] = {32, 64, 128};
  constexpr int kFactors = 6; // format, dtype, K, N, rows, rows
  using Pick = std::array<int, kFactors>;
  const Pick sizes = {18,
                      3,
                      int(choices.in_features.size()),
                      int(choices.out_features.size()),
                      int(choices.matvec_rows.size()),
                      int(choices.gemm_rows.size())};
  const auto possible = [&](const Pick& p) {
    return choices.in_features[p[2]] % kGroups[p[0] % 3] == 0;
  };
  const auto key = [](int i, int a, int j, int b) { return ((i * 64 + a) * 64 + j) * 64 + b; };

  std::set<int> uncovered;
  for (int i = 0; i < kFactors; ++i)
    for (int j = i + 1; j < kFactors; ++j)
      for (int a = 0; a < sizes[i]; ++a)
        for (int b = 0; b < sizes[j]; ++b)
          if (i != 0 || j != 2 || choices.in_features[b] % kGroups[a % 3] == 0)
            uncovered.insert(key(i, a, j, b));

  std::vector<Case> cases;
  Random random(1);
  while (!uncovered.empty()) {
    // The best of some random cases that contain the first pair still missing.
    const int first = *uncovered.begin();
    Pick best{};
    int best_count = 0;
    for (int attempt = 0; attempt < 40; ++attempt) {
      Pick p;
      for (int i = 0; i < kFactors; ++i)
        p[i] = random.below(sizes[i]);
      p[first >> 18] = first >> 12 & 63;
      p[first >> 6 & 63] = first & 63;
      if (!possible(p))
        continue;
      int count = 0;
      for (int i = 0; i < kFactors; ++i)
        for (int j = i + 1; j < kFactors; ++j)
          count += int(uncovered.count(key(i, p[i], j, p[j])));
      if (count > best_count) {
        best = p;
        best_count = count;
      }
    }
    if (best_count == 0)
      continue;
    for (int i = 0; i < kFactors; ++i)
      for (int j = i + 1; j < kFactors; ++j)
        uncovered.erase(key(i, best[i], j, best[j]));
    cases.push_back({{kBits[best[0] / 3], kGroups[best[0] % 3], DType(best[1]),
                      choices.in_features[best[2]], choices.out_features[best[3]]},
                     choices.matvec_rows[best[4]],
                     choices.gemm_rows[best[5]]});
  }
  return cases;
}

} // namespace q4metal::cpu::tests
