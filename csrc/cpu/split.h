// Activations as integers with a scale per block, and the canonical order of addition that makes
// every instruction set give the same bits: 16-bit integers in blocks of 128 for the fast matvec,
// 8-bit integers in blocks of one weight group for int8. (fast: range 32000, int8: range 127)
//
//   block:         sx = max|x| / range,  x16 = round_half_even(x * (range / max|x|))
//   group g:       t[g] = sum of code * x16, exact in int32 (255 * 32000 * 128 < 2^31)
//                  acc[g mod 16] = fma(float(t[g]), scale[g] * sx, acc[g mod 16])
//                  off[g mod 16] = fma(bias[g], float(sum of x16) * sx, off[g mod 16])
//   y = tree(acc) + tree(off), tree: lanes i and i + 8, then + 4, + 2, + 1
//
// The bias term uses the sum of the rounded x16, not of x: the rounding errors then cancel
// (relative rms error 4.8e-5 against 1.7e-4; int8: 1.3e-2 against 1.7e-2). A group never crosses a
// block.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels.h"

namespace q4metal::cpu {

constexpr int64_t kSplitBlock = 128;
constexpr float kSplitRange =
    32000.0f; // below 2^15 - 128: the high byte of x16 + 128 never overflows
constexpr float kInt8Range = 127.0f;
constexpr int kSplitLanes = 16;

// Which integers stand for x.
struct SplitFormat {
  int64_t block; // columns that share a scale, a multiple of the group size
  float range;   // magnitude of the largest integer
};

constexpr SplitFormat split_format(Precision precision, int group_size) {
  return precision == Precision::int8 ? SplitFormat{group_size, kInt8Range}
                                      : SplitFormat{kSplitBlock, kSplitRange};
}

struct SplitScale {
  float scale;   // sx
  float inverse; // 1 / sx, by its own division
};

// `largest`: largest |x| of the block, by comparison of bits, so that a NaN is the largest of all.
// A block that holds NaN or infinity makes every result NaN: there is no scale for it.
inline SplitScale split_scale(float largest, float range = kSplitRange) {
  if (!(largest <= std::numeric_limits<float>::max()))
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  return largest == 0 ? SplitScale{0, 0} : SplitScale{largest / range, range / largest};
}

// Rounds half to even without a call: adding 1.5 * 2^23 leaves no bits below one.
inline int32_t round_even(float value) {
  constexpr float kShift = 12582912.0f;
  return int32_t((value + kShift) - kShift);
}

// One row in natural order. `groups` gets, per group, float(sum of x16) * sx; `blocks` the sx.
inline void split_row(const float* x, int64_t columns, int group_size, SplitFormat format,
                      int16_t* codes, float* blocks, float* groups) {
  for (int64_t first = 0; first < columns; first += format.block) {
    const int64_t last = std::min(first + format.block, columns);
    uint32_t largest = 0;
    for (int64_t k = first; k < last; ++k)
      largest = std::max(largest, std::bit_cast<uint32_t>(std::fabs(x[k])));
    const SplitScale s = split_scale(std::bit_cast<float>(largest), format.range);
    const bool finite = s.scale == s.scale;
    *blocks++ = s.scale;
    for (int64_t g = first; g < last; g += group_size) {
      int32_t sum = 0;
      for (int64_t k = g; k < g + group_size; ++k) {
        const int32_t code = finite ? round_even(x[k] * s.inverse) : 0;
        codes[k] = int16_t(code);
        sum += code;
      }
      *groups++ = float(sum) * s.scale;
    }
  }
}

inline float split_tree(const float* lanes) {
  float sums[kSplitLanes];
  std::copy(lanes, lanes + kSplitLanes, sums);
  for (int width = kSplitLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      sums[i] += sums[i + width];
  return sums[0];
}

} // namespace q4metal::cpu
