// What the fast and the int8 matvec for AVX-512 VNNI share: integer activations (split.h), 16
// groups a step.
//
// x16 is two planes of bytes, high and low; vpdpbusd multiplies codes with either, and the sum of
// the high plane is shifted before the low plane joins it. int8 has one plane. Bytes of 4 bits hold
// codes 2j and 2j + 1, so each plane is split into even and odd k.
//
// Two vectors of W, a pair, are shuffled so that a group's halves lie on top of each other
// (`halves`); the sums of the pairs are joined by a tree until 16 groups make one vector. Lanes are
// in the interleaved order of avx512.h throughout, so the scales and the last tree are too.
#pragma once

#include "prefetch.h"
#include "split.h"

#include "avx512.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {

// y [N] from one prepared row, y [rows, N] from several; columns [begin, end).
template <Precision kPrecision>
void avx512_one_row(const PackedMatrix& w, const std::byte* prepared, float* y, int64_t begin,
                    int64_t end);
template <Precision kPrecision>
void avx512_several_rows(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                         int64_t begin, int64_t end);

namespace {

// How a step of 16 groups is read and prepared.
template <int kFieldCount, int kGroup, Precision kPrecision> struct Step {
  static constexpr int kFields = kFieldCount;
  static constexpr int kPlanes = kPrecision == Precision::int8 ? 1 : 2;
  static constexpr int kGroupColumns = kGroup;
  static constexpr int kGroupBytes = kGroup / kFields;
  static constexpr int kGroupLanes = kGroupBytes / 4;
  static constexpr int64_t kColumns = kLanes * kGroup;
  static constexpr int64_t kStepBytes = kLanes * kGroupBytes; // as read: codes of 4 or 8 bits
  static constexpr int kPairs = kGroupLanes / 2;              // pairs of vectors of W

  // Vectors of a prepared row: its codes, then sx and float(sum of codes) * sx of 16 groups.
  static constexpr int kCodeVectors = kGroupLanes * kFields * kPlanes;
  static constexpr int kVectors = kCodeVectors + 2;

  static constexpr int kPairVectors = 2 * kFields * kPlanes;

  // Which of a pair's vectors multiplies half `half` of W's two.
  static constexpr int at(int plane, int half, int field) {
    return (plane * 2 + half) * kFields + field;
  }
};

// How far ahead a thread asks for what it reads: codes, and the scales and biases of groups, two
// streams beside that of the codes.
struct Ahead {
  int64_t bytes = kPrefetchAhead, groups = 512;
};

Q4_INLINE void prefetch_groups(const PackedMatrix& w, int64_t group, Ahead ahead = {}) {
  const int64_t at = (group + ahead.groups) * int64_t(size_of(w.scales_dtype));
  prefetch_line(static_cast<const std::byte*>(w.scales) + at);
  prefetch_line(static_cast<const std::byte*>(w.biases) + at);
}

// Codes of field 0 or 1.
template <int kFields> Q4_INLINE __m512i field_of(__m512i bytes, int field) {
  if constexpr (kFields == 1)
    return bytes;
  const __m512i shifted = field == 0 ? bytes : _mm512_srli_epi16(bytes, 4);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(15));
}

// What is worked out once for all rows of W: a division a row took as long as ten vectors. The tail
// is the last step, of fewer than 16 groups.
struct RowShape {
  int64_t groups, stride; // bytes of W
  int64_t tail;           // groups
  __mmask16 tail_lanes;
  int64_t full_pairs;            // pairs of vectors of W in the tail
  __mmask64 tail_low, tail_high; // bytes of the two vectors of the pair after those

  template <typename S> static RowShape of(const PackedMatrix& w) {
    const int64_t groups = w.groups(), tail = groups % kLanes, bytes = tail * S::kGroupBytes;
    return {groups,
            w.row_stride(),
            tail,
            first_lanes(tail),
            bytes / 128,
            first_bytes(bytes % 128),
            first_bytes(bytes % 128 - 64)};
  }
};

// The codes of a row, a step at a time: in place, or unpacked to bytes with zeros after the last.
template <typename S, bool kDirect> class RowCodes {
public:
  RowCodes() = default;
  explicit RowCodes(const PackedMatrix& w)
      : unpack_(unpack_codes_of(w.bits)), step_bytes_(S::kColumns * w.bits / 8) {}

  Q4_INLINE const uint8_t* step(const uint8_t* packed, int64_t columns, Ahead ahead = {}) {
    if constexpr (kDirect)
      return packed;
    prefetch_lines(packed + ahead.bytes, step_bytes_);
    if (columns < S::kColumns)
      std::memset(bytes_, 0, sizeof bytes_);
    unpack_(packed, std::min(columns, S::kColumns), bytes_);
    return bytes_;
  }
  Q4_INLINE int64_t step_bytes() const { return kDirect ? S::kStepBytes : step_bytes_; }

private:
  UnpackCodes unpack_ = nullptr;
  int64_t step_bytes_ = 0; // packed
  alignas(64) uint8_t bytes_[kDirect ? 64 : S::kStepBytes];
};

// Adds what 16 groups' sums of products make. `x`: 16 sx, and 16 sums of its integers times sx.
Q4_INLINE void add_groups(__m512i products, __m512 scale, __m512 bias, const float* x, Sums& sums) {
  const __m512 factor = _mm512_mul_ps(scale, _mm512_load_ps(x));
  sums.acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), factor, sums.acc);
  sums.off = _mm512_fmadd_ps(bias, _mm512_load_ps(x + kLanes), sums.off);
}

// Calls f.template operator()<S, kDirect>() for the steps of w; kDirect: W is read as it lies.
template <Precision kPrecision, typename F> void for_step(const PackedMatrix& w, const F& f) {
  for_format(w, [&]<int kFields, int kGroup>() {
    using S = Step<kFields, kGroup, kPrecision>;
    if constexpr (kFields == 1) {
      if (w.bits != 8)
        return f.template operator()<S, false>();
    }
    f.template operator()<S, true>();
  });
}

} // namespace
} // namespace q4metal::cpu
