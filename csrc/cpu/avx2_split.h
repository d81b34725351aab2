// How the AVX2 integer matvec (avx2_split.cpp) wants its activations: as it multiplies eight groups
// side by side, so does `prepare` (avx2_split_prepare.cpp) lay x out.
//
// A turn is eight consecutive weight groups; they are consecutive in memory too, also across the
// end of a row. Four 32-byte loads are transposed as 4x4 words of 32 bits within each half, so that
// a 32-bit lane holds codes of one group only, and the products of a whole turn can be added
// without ever being shuffled. x comes in the same order:
//
//   half string   the x of 32 (4 bits), 16 (8 bits) or 8 (other widths) codes of one group that
//                 meet the codes in turn: 16 bytes. One set of codes has `strings` of them
//                   4 bits: high plane even k, high odd, low even, low odd (x16 = 256 high + low;
//                           int8 activations have no high plane)
//                   8 bits: x16 of even k, of odd k;    others: x16 in order
//   block         per string: four vectors, the transposed strings of four vectors of weights
//   turn          its blocks in the order of the kernel's loads
//   row of x      its turns, then sx and float(sum x16) * sx of every group, padded with zeros to
//                 whole vectors
//
// A row of few groups would waste much of its last turn (K = 576 in groups of 32: 18 of 24), so
// several short rows of W make one line of `rows` rows that ends with a turn, and x is repeated.
#pragma once

#include <numeric>

#include "split.h"

#include "avx2.h" // from here on everything compiles for AVX2

namespace q4metal::cpu {
namespace {

constexpr int kTurnGroups = 8;

// Rows are joined to lines of at most this many groups: x of a longer line would leave the L1
// cache.
constexpr int64_t kMaxLineGroups = 160;

constexpr int half_codes(int bits) { return bits == 4 ? 32 : bits == 8 ? 16 : 8; }

constexpr int strings_of(int bits, int planes) {
  return bits == 4 ? 2 * planes : bits == 8 ? 2 : 1;
}

// int8 activations are one plane; only 4-bit kernels multiply planes.
constexpr int planes_of(Precision precision) { return precision == Precision::int8 ? 1 : 2; }

struct PreparedRow {
  int64_t groups;     // of a row of W
  int64_t rows;       // of W in a line
  int64_t turns;      // of a line
  int64_t turn_bytes; // of x

  PreparedRow(const PackedMatrix& w, int planes)
      : groups(w.groups()), rows(joined_rows(groups)),
        turns((rows * groups + kTurnGroups - 1) / kTurnGroups),
        turn_bytes(kTurnGroups * w.group_size / half_codes(w.bits) * strings_of(w.bits, planes) *
                   16) {}
  static constexpr int64_t joined_rows(int64_t groups) {
    const int64_t rows = kTurnGroups / std::gcd(groups, int64_t(kTurnGroups));
    return rows * groups <= kMaxLineGroups ? rows : 1;
  }
  int64_t padded_groups() const { return round_up(groups, kTurnGroups); }
  int64_t bytes() const { return round_up(turns * turn_bytes + padded_groups() * 8, 64); }
  const float* scales(const std::byte* row) const {
    return reinterpret_cast<const float*>(row + turns * turn_bytes);
  }
  const float* sums(const std::byte* row) const { return scales(row) + padded_groups(); }
};

Q4_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// 4x4 words of 32 bits in each 128-bit half.
Q4_INLINE void transpose(__m256i* v) {
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, b);
  v[1] = _mm256_unpackhi_epi64(a, b);
  v[2] = _mm256_unpacklo_epi64(c, d);
  v[3] = _mm256_unpackhi_epi64(c, d);
}

} // namespace
} // namespace q4metal::cpu
