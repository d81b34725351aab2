// What the two integer GEMMs for AVX-512 share (avx512_fast_gemm.cpp, avx512_int8_gemm.cpp).
//
// A step multiplies one dword of x per row with one vector of W per 16 output features: two int16
// codes where x is int16, four bytes where it is int8. Features lie across the lanes, so there are
// no horizontal sums, and no number depends on its neighbours. Some columns of W are expanded for a
// tile of features at a time, to a panel that stays in L1 while all rows of x pass by.
//
// Which codes share a dword follows from W: shifting a dword of packed codes by i codes and masking
// leaves field i, so codes 8u + i and 8u + i + 4 for int16 and 4 bits. `prepare` puts x in that
// order, four rows side by side.
#pragma once

#include "avx512.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

constexpr int kQuad = 4;        // rows of x side by side
constexpr int kTileVectors = 2; // of 16 features
constexpr int64_t kTile = kTileVectors * kLanes;
constexpr int64_t kFeaturesAtATime = 192; // that use x while it is in the L2 cache
constexpr int64_t kWidestBlock = 640;     // columns that either expands at a time

// Which codes dwords hold. kCodes: in a dword of x; kCodesInByte: of W (fields_of).
template <int kCodes, int kCodesInByte> struct Dwords {
  static constexpr int kCodeBits = 8 / kCodesInByte;
  static constexpr int kFields = 4 * kCodesInByte / kCodes; // dwords of x for a dword of W

  // Code `i` of dword `dword`.
  static constexpr int code_at(int dword, int i) {
    return dword / kFields * kCodes * kFields + dword % kFields + i * kFields;
  }
};

// A block with nothing larger counts as zeros: the inverse of its scale could be infinite.
constexpr float kSmallest = 0x1p-110f;

template <typename T> const T* after(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const std::byte*>(p) + bytes);
}

// The low halves of 32-bit lanes side by side: those of `first` below those of `second`.
Q4_INLINE __m512i pairs_of(__m512i first, __m512i second) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16));
}

// ---- W

// Up to 16 output features, those from `first` to `end`; the last in place of those that do not
// exist. Vector i of a transposition is feature interleaved(i), so that lanes come out in order.
struct Features {
  int64_t first, end;

  int64_t of(int i) const { return std::min<int64_t>(first + interleaved(i), end - 1); }
};

// Scales or biases of 16 groups from `group` on, zeros after a row's last: out[i] is group i's.
Q4_INLINE void transpose_groups(const PackedMatrix& w, const void* values, Features features,
                                int64_t group, __m512* out) {
  const int64_t groups = w.groups();
  const __mmask16 mask = first_lanes(groups - group);
  __m512i v[kLanes];
  for (int i = 0; i < kLanes; ++i)
    v[i] =
        _mm512_castps_si512(load_groups<false>(w, values, features.of(i) * groups + group, mask));
  transpose<kLanes>(v);
  for (int g = 0; g < kLanes; ++g)
    out[g] = _mm512_castsi512_ps(v[g]);
}

// Columns [k, k + columns) of 16 features: 2, 3, 5 and 6 bits become bytes.
class PackedRows {
public:
  PackedRows(const PackedMatrix& w, Features features, int64_t k, int64_t columns) {
    const UnpackCodes unpack = unpack_codes_of(w.bits);
    for (int i = 0; i < kLanes; ++i) {
      rows_[i] = w.weight + features.of(i) * w.row_stride() + k * w.bits / 8;
      if (unpack != nullptr) {
        unpack(rows_[i], columns, unpacked_[i]);
        rows_[i] = unpacked_[i];
      }
    }
  }

  // Bytes [at, at + 64) of each, zeros behind the first `bytes`: v[i] is dword i of all features.
  Q4_INLINE void transpose_at(int64_t at, int64_t bytes, __m512i (&v)[kLanes]) const {
    const __mmask64 mask = first_bytes(bytes - at);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      v[i] = _mm512_maskz_loadu_epi8(mask, rows_[i] + at);
    transpose<kLanes>(v);
  }

private:
  const uint8_t* rows_[kLanes];
  alignas(64) uint8_t unpacked_[kLanes][kWidestBlock];
};

// For tiles of features [begin, end), from n on, and blocks of columns, from k on: expands W into
// `panel`, 16 features at a time, then body(k, columns, n, features).
template <typename Panel, typename Body>
void for_blocks(const PackedMatrix& w, int64_t block, int64_t begin, int64_t end,
                void (*expand)(const PackedMatrix&, Features, int64_t, int64_t, int, Panel&),
                Panel& panel, const Body& body) {
  for (int64_t first = begin; first < end; first += kFeaturesAtATime)
    for (int64_t k = 0; k < w.in_features; k += block)
      for (int64_t n = first; n < std::min(first + kFeaturesAtATime, end); n += kTile) {
        const int64_t columns = std::min(block, w.in_features - k);
        const int64_t features = std::min(kTile, end - n);
        for (int64_t i = 0; i < features; i += kLanes)
          expand(w, {n + i, end}, k, columns, int(i / kLanes), panel);
        body(k, columns, n, features);
      }
}

} // namespace
} // namespace q4metal::cpu
