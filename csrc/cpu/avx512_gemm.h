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

#include <cmath>
#include <limits>

#include "avx512.h" // from here on everything compiles for AVX-512

namespace q4metal::cpu {
namespace {

constexpr int kQuad = 4; // rows of x side by side

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

// ---- x

// For integers whose euclidean norm is `norm`, if rounding did not change it. Where x holds NaN or
// infinity every result is NaN: there is no scale for it. `columns` is a multiple of 16.
inline SplitScale scale_to_norm(const float* x, int64_t columns, float norm) {
  const float largest = largest_magnitude(x, columns);
  if (!(largest <= std::numeric_limits<float>::max()))
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  if (largest < kSmallest)
    return {0, 0};
  const __m512 inverse = _mm512_set1_ps(1 / largest);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; k += kLanes) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + k), inverse);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float range = norm / std::sqrt(_mm512_reduce_add_ps(squares)); // of the largest
  return {largest / range, range / largest};
}

// The codes of a row at `codes` as 16 dwords, interleaved so that `transpose` of four rows puts
// dwords 4i to 4i + 3 of all four into vector i.
template <int kCodes, int kCodesInByte> Q4_INLINE __m512i dwords_of(const int16_t* codes) {
  using D = Dwords<kCodes, kCodesInByte>;
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 32> order{};
    for (int i = 0; i < 32; ++i) {
      const int dword = i / kCodes;
      order[i] = int16_t(D::code_at(kCodes == 2 ? interleaved(dword) : dword, i % kCodes));
    }
    return order;
  }();
  const __m512i order = load(kOrder.data());
  if constexpr (kCodes == 2) {
    return _mm512_permutexvar_epi16(order, load(codes));
  } else {
    const __m256i low = _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(order, load(codes)));
    const __m256i high = _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(order, load(codes + 32)));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return _mm512_castps_si512(interleave(_mm512_castsi512_ps(both)));
  }
}

// `columns` codes, a multiple of 32, of four rows side by side.
template <int kCodes, int kCodesInByte, size_t kMost>
Q4_INLINE void interleave_rows(const int16_t (&codes)[kQuad][kMost], int64_t columns,
                               int32_t* out) {
  constexpr int kStep = kLanes * kCodes;
  for (int64_t k = 0; k < columns; k += kStep) {
    __m512i v[kQuad];
    for (int r = 0; r < kQuad; ++r)
      v[r] = dwords_of<kCodes, kCodesInByte>(codes[r] + k);
    transpose<kQuad>(v);
    // 32 columns at the end are half a vector of bytes.
    const int vectors = int(std::min<int64_t>(kStep, columns - k) * kQuad / kStep);
    for (int i = 0; i < vectors; ++i, out += kLanes)
      store(out, v[i]);
  }
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
  alignas(64) uint8_t unpacked_[kLanes][512];
};

} // namespace
} // namespace q4metal::cpu
