// What the NEON kernels share. Everything after this header, itself included, compiles for ARMv8.2
// with the dot product instructions: include it last, and run nothing of it before dispatch.cpp has
// looked at the CPU.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "float_types.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace q4metal::cpu {

extern const MatvecKernel neon_split_matvec, neon_int8_matvec;
extern const GemmKernel neon_split_gemm, neon_int8_gemm;

// Activations as integers (split.h), for the matvec and the GEMM alike. A row is, per 32 columns,
// the bytes of its integers: 32 high bytes and 32 low ones for fast, 32 bytes for int8. High is
// (x16 + 128) >> 8, low the remainder, both signed. Where W has 4 bits, even columns come before
// odd ones, as a vector of packed bytes gives them. Then per group, padded with zeros to whole
// vectors: sx, float(sum of x16) * sx, and for 8 bits 128 * sum of x16.
struct NeonSplitRow {
  int64_t codes, groups; // bytes, elements

  NeonSplitRow(const PackedMatrix& w, int planes)
      : codes(w.in_features * planes), groups((w.groups() + 3) / 4 * 4) {}
  int64_t bytes() const { return (codes + 12 * groups + 63) / 64 * 64; }
  const float* scales(const std::byte* row) const {
    return reinterpret_cast<const float*>(row + codes);
  }
  const float* sums(const std::byte* row) const { return scales(row) + groups; }
  const int32_t* offsets(const std::byte* row) const {
    return reinterpret_cast<const int32_t*>(sums(row) + groups);
  }
};

constexpr int split_planes(Precision p) { return p == Precision::int8 ? 1 : 2; }

void neon_split_rows(Precision precision, const PackedMatrix& w, const float* x, int64_t first,
                     int64_t last, std::byte* prepared);

namespace {

constexpr int64_t kPrefetchAhead = 1024; // bytes ahead in the one sequential stream of weights

Q4_INLINE float32x4_t load4(const void* values, DType dtype) {
  const auto* p = static_cast<const uint8_t*>(values); // any address
  switch (dtype) {
  case DType::f32:
    return vreinterpretq_f32_u8(vld1q_u8(p));
  case DType::f16:
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
  case DType::bf16:
    break;
  }
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}

// Scales or biases [index, index + 4) of a matrix, of which `count` may be read; zeros in place of
// the others.
Q4_INLINE float32x4_t load_groups(const PackedMatrix& w, const void* values, int64_t index,
                                  int64_t count) {
  const int64_t size = size_of(w.scales_dtype);
  const auto* p = static_cast<const std::byte*>(values) + index * size;
  if (count >= 4)
    return load4(p, w.scales_dtype);
  alignas(16) std::byte padded[16] = {};
  std::memcpy(padded, p, count * size);
  return load4(padded, w.scales_dtype);
}

// ---- codes: how 32 of them become two vectors of bytes. `signed_codes` are less by `kOffset`, so
// that they fit signed bytes.

struct Nibbles {
  static constexpr int kOffset = 0;
  static constexpr bool kEvenOdd = true; // the even codes, then the odd ones

  explicit Nibbles(int) {}
  static constexpr int run_bytes() { return 16; }
  Q4_INLINE void load(const uint8_t* run, uint8x16_t* out) const {
    const uint8x16_t v = vld1q_u8(run);
    out[0] = vandq_u8(v, vdupq_n_u8(15));
    out[1] = vshrq_n_u8(v, 4);
  }
};

struct Octets {
  static constexpr int kOffset = 128;
  static constexpr bool kEvenOdd = false;

  explicit Octets(int) {}
  static constexpr int run_bytes() { return 32; }
  Q4_INLINE void load(const uint8_t* run, uint8x16_t* out) const {
    out[0] = vld1q_u8(run);
    out[1] = vld1q_u8(run + 16);
  }
};

// 2, 3, 5 or 6 bits. A code lies in a window of two bytes: a table look-up fetches eight windows,
// which are then shifted each by its own distance. The first 16 codes come from the first bytes of
// a run, the others from its last ones: no read passes the end.
struct OddWidth {
  static constexpr int kOffset = 0;
  static constexpr bool kEvenOdd = false;

  explicit OddWidth(int bits)
      : wide(bits > 4), last(4 * bits - (wide ? 16 : 8)), mask(vdupq_n_u8((1 << bits) - 1)) {
    for (int i = 0; i < 4; ++i) {
      uint8_t bytes[16];
      for (int code = 0; code < 8; ++code) {
        const int byte = (8 * i + code) * bits / 8 - (i < 2 ? 0 : last);
        bytes[2 * code] = uint8_t(byte);
        bytes[2 * code + 1] = uint8_t(byte + 1); // 16 gives zero
      }
      windows[i] = vld1q_u8(bytes);
    }
    int16_t distances[8];
    for (int code = 0; code < 8; ++code)
      distances[code] = int16_t(-(code * bits % 8));
    shifts = vld1q_s16(distances);
  }

  int run_bytes() const { return wide ? last + 16 : last + 8; }

  Q4_INLINE void load(const uint8_t* run, uint8x16_t* out) const {
    const uint8x16_t none = vdupq_n_u8(0);
    const uint8x16_t first = wide ? vld1q_u8(run) : vcombine_u8(vld1_u8(run), vget_low_u8(none));
    const uint8x16_t second =
        wide ? vld1q_u8(run + last) : vcombine_u8(vld1_u8(run + last), vget_low_u8(none));
    out[0] = sixteen(first, windows[0], windows[1]);
    out[1] = sixteen(second, windows[2], windows[3]);
  }

private:
  Q4_INLINE uint8x16_t sixteen(uint8x16_t bytes, uint8x16_t low, uint8x16_t high) const {
    const auto shifted = [&](uint8x16_t window) {
      const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, window));
      return vreinterpretq_u8_u16(vshlq_u16(words, shifts));
    };
    return vandq_u8(vuzp1q_u8(shifted(low), shifted(high)), mask);
  }

  bool wide;
  int last;
  uint8x16_t mask, windows[4];
  int16x8_t shifts;
};

template <typename Width>
Q4_INLINE void signed_codes(const Width& width, const uint8_t* run, int8x16_t* out) {
  uint8x16_t codes[2];
  width.load(run, codes);
  for (int i = 0; i < 2; ++i)
    out[i] =
        vreinterpretq_s8_u8(Width::kOffset == 0 ? codes[i] : veorq_u8(codes[i], vdupq_n_u8(0x80)));
}

// In natural order.
template <typename Width>
Q4_INLINE void ordered_codes(const Width& width, const uint8_t* run, uint8x16_t* out) {
  uint8x16_t codes[2];
  width.load(run, codes);
  out[0] = Width::kEvenOdd ? vzip1q_u8(codes[0], codes[1]) : codes[0];
  out[1] = Width::kEvenOdd ? vzip2q_u8(codes[0], codes[1]) : codes[1];
}

// Calls f(width, group) for the format of w. `group` is the group size as a constant for the widths
// that matter for speed, so that their loops over a group unroll; the others share one build.
template <int kSize> struct FixedGroup {
  constexpr operator int() const { return kSize; }
};

template <typename Width, typename F> void for_group_size(const PackedMatrix& w, const F& f) {
  switch (w.group_size) {
  case 32:
    return f(Width(w.bits), FixedGroup<32>());
  case 64:
    return f(Width(w.bits), FixedGroup<64>());
  default:
    return f(Width(w.bits), FixedGroup<128>());
  }
}

template <typename F> void for_format(const PackedMatrix& w, const F& f) {
  switch (w.bits) {
  case 4:
    return for_group_size<Nibbles>(w, f);
  case 8:
    return for_group_size<Octets>(w, f);
  default:
    return f(OddWidth(w.bits), w.group_size);
  }
}

} // namespace
} // namespace q4metal::cpu
