// What the NEON kernels share. Everything after this header, itself included, compiles for ARMv8.2
// with the dot product instructions, and where a file defines Q4_I8MM also with those of i8mm:
// include it last, and run nothing of it before dispatch.cpp has looked at the CPU.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "float_types.h"
#include "kernels.h"

// GCC expands no macros in this pragma, so the targets are written out.
#if defined(__clang__) && defined(Q4_I8MM)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))),               \
                             apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#elif defined(Q4_I8MM)
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace q4metal::cpu {

// The functions of the integer kernels, for fast and int8. Functions, not kernels: a table made of
// their addresses needs no code to run when the library is loaded.
template <Precision kPrecision> struct NeonMatvec {
  static size_t prepared_bytes(const PackedMatrix& w, int64_t rows);
  static void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared);
  static void run(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                  int64_t begin, int64_t end);
};

template <Precision kPrecision> struct NeonGemm {
  static size_t prepared_bytes(const PackedMatrix& w, int64_t rows);
  static void prepare(const PackedMatrix& w, const float* x, int64_t rows, int64_t first,
                      int64_t last, std::byte* prepared);
  static void run(const PackedMatrix& w, const float* x, const std::byte* prepared, int64_t rows,
                  float* y, int64_t begin, int64_t end);
};

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

// Scales or biases [index, index + 4) of all N * groups of a matrix, zeros in place of those from
// `count` on. They belong to the next row, so a whole vector may be read, except at the end of the
// array.
Q4_INLINE float32x4_t load_groups(const PackedMatrix& w, const void* values, int64_t index,
                                  int64_t count) {
  const int64_t size = size_of(w.scales_dtype);
  const auto* p = static_cast<const std::byte*>(values) + index * size;
  if (count >= 4)
    return load4(p, w.scales_dtype);
  static constexpr uint32_t kMask[8] = {~0u, ~0u, ~0u, ~0u};
  if (index + 4 <= w.out_features * w.groups())
    return vreinterpretq_f32_u32(
        vandq_u32(vreinterpretq_u32_f32(load4(p, w.scales_dtype)), vld1q_u32(kMask + 4 - count)));
  alignas(16) std::byte padded[16] = {};
  std::memcpy(padded, p, count * size);
  return load4(padded, w.scales_dtype);
}

// Calls f(0) to f(kCount - 1) with constants: which lane an instruction takes is part of it.
template <int kCount, typename F> Q4_INLINE void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

constexpr int64_t kTileRows = 4; // of x, what the registers hold

// Calls f<1>() to f<kTileRows>(), with `rows` or the most.
template <typename F> Q4_INLINE void for_tile_rows(int64_t rows, const F& f) {
  switch (rows) {
  case 1:
    return f.template operator()<1>();
  case 2:
    return f.template operator()<2>();
  case 3:
    return f.template operator()<3>();
  default:
    return f.template operator()<kTileRows>();
  }
}

// Calls f<kRows>(m, begin, end) for tiles of rows of x and ranges of rows of W. Beyond one tile the
// later ones go over a few rows of W, which are in the cache by then.
template <typename F> void for_matvec_tiles(int64_t rows, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kRowsOfW = 16;
  const int64_t step = rows > kTileRows ? kRowsOfW : std::max<int64_t>(end - begin, 1);
  for (int64_t n = begin; n < end; n += step)
    for (int64_t m = 0; m < rows; m += kTileRows)
      for_tile_rows(rows - m, [&]<int kRows>() {
        f.template operator()<kRows>(m, n, std::min(n + step, end));
      });
}

// ---- codes: how 32 of them become two vectors of bytes. Less kOffset they fit signed bytes.

struct Nibbles {
  static constexpr int kOffset = 0;
  static constexpr bool kEvenOdd = true; // the 16 even codes, then the odd ones

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

// `codes` less kOffset, as signed bytes.
template <typename Width> Q4_INLINE int8x16_t signed_codes(uint8x16_t codes) {
  return vreinterpretq_s8_u8(Width::kOffset == 0 ? codes : veorq_u8(codes, vdupq_n_u8(0x80)));
}

template <typename Width>
Q4_INLINE void signed_codes(const Width& width, const uint8_t* run, int8x16_t* out) {
  uint8x16_t codes[2];
  width.load(run, codes);
  out[0] = signed_codes<Width>(codes[0]);
  out[1] = signed_codes<Width>(codes[1]);
}

// Calls f(width) for the bits of w.
template <typename F> void for_width(const PackedMatrix& w, const F& f) {
  switch (w.bits) {
  case 4:
    return f(Nibbles(w.bits));
  case 8:
    return f(Octets(w.bits));
  default:
    return f(OddWidth(w.bits));
  }
}

// Calls f(width, group) for the format of w. `group` is the group size, as a constant for the
// widths that matter for speed, so that their loops over a group unroll; the others share one
// build.
template <int kSize> struct FixedGroup {
  constexpr operator int() const { return kSize; }
};

template <typename F> void for_format(const PackedMatrix& w, const F& f) {
  for_width(w, [&]<typename Width>(const Width& width) {
    if constexpr (std::is_same_v<Width, OddWidth>)
      return f(width, w.group_size);
    else if (w.group_size == 32)
      return f(width, FixedGroup<32>());
    else if (w.group_size == 64)
      return f(width, FixedGroup<64>());
    else
      return f(width, FixedGroup<128>());
  });
}

} // namespace
} // namespace q4metal::cpu
