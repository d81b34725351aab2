// What the AVX-512 kernels share. Everything after this header, itself included, compiles for
// AVX-512 F, BW, DQ, VL and VNNI: include it last, and run nothing of it before dispatch.cpp has
// looked at the CPU.
//
// Sixteen groups (or rows) that lie one after another in vectors are brought side by side by
// `halves`, level by level, until lane 4i + j holds group 4j + i: the interleaved order, its own
// inverse.
#pragma once

// GCC 12 warns of its own headers: an undefined vector there is initialised with itself.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <algorithm>
#include <array>
#include <cstring>

#include "float_types.h"
#include "split.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2"))),   \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")
#endif

namespace q4metal::cpu {

extern const KernelTable avx512_kernels;

// The functions of a MatvecKernel and of a GemmKernel, for fast and int8. Functions, not kernels: a
// table made of their addresses needs no code to run when the library is loaded.
template <Precision kPrecision> struct Avx512Matvec {
  static size_t prepared_bytes(const PackedMatrix& w, int64_t rows);
  static void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared);
  static void run(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                  int64_t begin, int64_t end);
};

template <Precision kPrecision> struct Avx512Gemm {
  static size_t prepared_bytes(const PackedMatrix& w, int64_t rows);
  static void prepare(const PackedMatrix& w, const float* x, int64_t rows, int64_t first,
                      int64_t last, std::byte* prepared);
  static void run(const PackedMatrix& w, const float* x, const std::byte* prepared, int64_t rows,
                  float* y, int64_t begin, int64_t end);
};

namespace {

constexpr int kLanes = 16;

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Sums that stay in registers over a loop have this type: GCC 12 copies those of type __m512i
// before and after every product (71 instructions in place of 39 in the matvec of eight rows).
typedef int32_t Int32Vec __attribute__((vector_size(64)));

// Adds to every lane the products of four unsigned and four signed bytes.
Q4_INLINE Int32Vec multiply_add(Int32Vec sum, __m512i codes, __m512i x) {
  return (Int32Vec)_mm512_dpbusd_epi32((__m512i)sum, codes, x);
}

Q4_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
Q4_INLINE void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

// A mask of `count` lanes; none if it is negative, all if it is more than there are.
Q4_INLINE __mmask64 first_bytes(int64_t count) {
  return _bzhi_u64(~uint64_t(0), unsigned(std::clamp<int64_t>(count, 0, 64)));
}
Q4_INLINE __mmask16 first_lanes(int64_t count) {
  return __mmask16(_bzhi_u32(0xffff, unsigned(std::clamp<int64_t>(count, 0, kLanes))));
}

// ---- side by side

struct Halves {
  __m512i low, high;
};

// a and b hold groups of kCount lanes; `low` gets the lower halves of all these groups and `high`
// the upper ones. From 16 to 2 lanes in turn this is a transposition into the interleaved order.
template <int kCount> Q4_INLINE Halves halves(__m512i a, __m512i b) {
  if constexpr (kCount == 32) // a and b are one group
    return {a, b};
  else if constexpr (kCount == 16)
    return {_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee)};
  else if constexpr (kCount == 8)
    return {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)};
  else if constexpr (kCount == 4)
    return {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)};
  else
    return {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)};
}

// kCount vectors that hold 16 groups of kCount lanes; v[d] gets lane d of every group.
template <int kCount> Q4_INLINE void transpose(__m512i* v) {
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    __m512i low[kHalf], high[kHalf];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      const Halves h = halves<kCount>(v[2 * i], v[2 * i + 1]);
      low[i] = h.low;
      high[i] = h.high;
    }
    transpose<kHalf>(low);
    transpose<kHalf>(high);
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      v[i] = low[i];
      v[kHalf + i] = high[i];
    }
  }
}

constexpr int interleaved(int lane) { return lane % 4 * 4 + lane / 4; }

// Lane numbers, for permutexvar.
template <bool kInterleave> constexpr auto lane_order() {
  std::array<int32_t, kLanes> order{};
  for (int lane = 0; lane < kLanes; ++lane)
    order[lane] = kInterleave ? interleaved(lane) : lane;
  return order;
}

Q4_INLINE __m512 interleave(__m512 v) {
  alignas(64) static constexpr auto kOrder = lane_order<true>();
  return _mm512_permutexvar_ps(load(kOrder.data()), v);
}

// Scales or biases [index, index + 16) of all N * groups of a matrix, zeros where the mask has
// none. The dtype is a branch that is always predicted, not a template parameter, which would
// triple the build.
template <bool kInterleave>
Q4_INLINE __m512 load_groups(const PackedMatrix& w, const void* values, int64_t index,
                             __mmask16 mask) {
  alignas(64) static constexpr auto kOrder = lane_order<kInterleave>();
  const auto* p = static_cast<const std::byte*>(values) + index * size_of(w.scales_dtype);
  if (w.scales_dtype == DType::f32) {
    const __m512 v = _mm512_maskz_loadu_ps(mask, p);
    return kInterleave ? _mm512_permutexvar_ps(load(kOrder.data()), v) : v;
  }
  // One permutation of 16-bit elements orders and widens: bfloat16 is the upper half of a float.
  const __m512i v = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, p));
  const __m512i order = _mm512_slli_epi32(load(kOrder.data()), 16);
  const __m512i wide = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, v);
  if (w.scales_dtype == DType::bf16)
    return _mm512_castsi512_ps(wide);
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(wide, 16)));
}

// ---- codes of 2, 3, 5 and 6 bits as bytes

// Which bytes of a vector of packed codes the shuffles below pick, and where in them codes begin.
template <int kBits> struct UnpackTables {
  alignas(64) std::array<int32_t, 16> words{};
  alignas(64) std::array<int8_t, 64> even{}, odd{};
  alignas(64) std::array<int16_t, 32> right{}, left{};

  constexpr UnpackTables() {
    for (int quarter = 0; quarter < 4; ++quarter) { // 16 codes, 2 * kBits bytes
      const int first = 2 * kBits * quarter;
      for (int i = 0; i < 4; ++i)
        words[4 * quarter + i] = std::min(first / 4 + i, 15);
      for (int pair = 0; pair < 8; ++pair) {
        const int bit = first % 4 * 8 + 2 * kBits * pair;
        const int at = 8 * quarter + pair;
        for (int i = 0; i < 2; ++i) {
          even[2 * at + i] = int8_t(bit / 8 + i);
          odd[2 * at + i] = int8_t((bit + kBits) / 8 + i);
        }
        right[at] = int16_t(bit % 8);
        left[at] = int16_t(8 - (bit + kBits) % 8);
      }
    }
  }
};

// 64 codes in natural order, one a byte, from a vector whose first 8 * kBits bytes hold them: two
// bytes around each code, even and odd codes apart, shifted to the lower and the upper byte of a
// word.
template <int kBits> Q4_INLINE __m512i unpack_bytes(__m512i packed) {
  static constexpr UnpackTables<kBits> kTables;
  const __m512i v = _mm512_permutexvar_epi32(load(kTables.words.data()), packed);
  const __m512i even = _mm512_srlv_epi16(_mm512_shuffle_epi8(v, load(kTables.even.data())),
                                         load(kTables.right.data()));
  const __m512i odd = _mm512_sllv_epi16(_mm512_shuffle_epi8(v, load(kTables.odd.data())),
                                        load(kTables.left.data()));
  constexpr int kPick = 0xca; // of the first operand's bits: second where set, third where not
  const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0xff), even, odd, kPick);
  return _mm512_and_si512(both, _mm512_set1_epi8((1 << kBits) - 1));
}

// `columns` codes, a multiple of 32, to as many bytes; whole vectors are written, with zeros.
template <int kBits> void unpack_codes(const uint8_t* packed, int64_t columns, uint8_t* out) {
  for (int64_t k = 0; k < columns; k += 64) {
    const int64_t bytes = std::min<int64_t>(64, columns - k) * kBits / 8;
    store(out + k,
          unpack_bytes<kBits>(_mm512_maskz_loadu_epi8(first_bytes(bytes), packed + k * kBits / 8)));
  }
}

using UnpackCodes = void (*)(const uint8_t* packed, int64_t columns, uint8_t* out);

// Null for 4 and 8 bits, which kernels read as they lie.
inline UnpackCodes unpack_codes_of(int bits) {
  switch (bits) {
  case 2:
    return unpack_codes<2>;
  case 3:
    return unpack_codes<3>;
  case 5:
    return unpack_codes<5>;
  case 6:
    return unpack_codes<6>;
  default:
    return nullptr;
  }
}

// ---- x as integers

// By comparison of bits, as split_scale wants it. `count` is a multiple of 32.
inline float largest_magnitude(const float* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += kLanes)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(magnitude, load(x + k)));
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  return std::bit_cast<float>(bits);
}

// split_row of split.h for `columns` columns from the start of a block. `scales` gets the block's
// sx once per group, `sums` the sum of the group's integers.
inline void round_columns(const float* x, int64_t columns, int group_size, SplitFormat format,
                          int16_t* codes, float* scales, float* sums) {
  for (int64_t first = 0; first < columns; first += format.block) {
    const int64_t last = std::min(first + format.block, columns);
    const SplitScale s = split_scale(largest_magnitude(x + first, last - first), format.range);
    const __m512 inverse = _mm512_set1_ps(s.inverse);
    for (int64_t g = first; g < last; g += group_size) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = g; k < g + group_size; k += kLanes) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), inverse));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), _mm512_cvtepi32_epi16(v));
        sum = _mm512_add_epi32(sum, v);
      }
      *scales++ = s.scale;
      *sums++ = float(_mm512_reduce_add_epi32(sum));
    }
  }
}

// ---- the tree of split.h in the interleaved order, for eight results at once

struct Sums {
  __m512 acc, off; // split.h
};

Q4_INLINE __m512 add_halves(__m512 a, __m512 b, __m512 c, __m512 d) {
  const auto far = [](__m512 v, __m512 u) __attribute__((always_inline)) { // lanes 8 apart
    const Halves h = halves<2>(_mm512_castps_si512(v), _mm512_castps_si512(u));
    return _mm512_add_ps(_mm512_castsi512_ps(h.low), _mm512_castsi512_ps(h.high));
  };
  const __m512 ab = far(a, b), cd = far(c, d);
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd)); // 4 apart
}

template <int kCount> Q4_INLINE __m512 add_quarters(__m512 a, __m512 b) {
  const Halves h = halves<kCount>(_mm512_castps_si512(a), _mm512_castps_si512(b));
  return _mm512_add_ps(_mm512_castsi512_ps(h.low), _mm512_castsi512_ps(h.high));
}

// tree(acc) + tree(off) of eight results.
Q4_INLINE __m256 finish(const Sums* s) {
  const __m512 acc0 = add_halves(s[0].acc, s[1].acc, s[2].acc, s[3].acc);
  const __m512 acc1 = add_halves(s[4].acc, s[5].acc, s[6].acc, s[7].acc);
  const __m512 off0 = add_halves(s[0].off, s[1].off, s[2].off, s[3].off);
  const __m512 off1 = add_halves(s[4].off, s[5].off, s[6].off, s[7].off);
  // Lanes 2 apart, then neighbours.
  const __m512 both = add_quarters<8>(add_quarters<16>(acc0, acc1), add_quarters<16>(off0, off1));
  return _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
}

// ---- formats

// Codes in a byte that kernels read: two of 4 bits; other widths are bytes or become bytes.
constexpr int fields_of(int bits) { return bits == 4 ? 2 : 1; }

// Calls f.template operator()<fields, group_size>() for the format of w.
template <int kFields, typename F> void for_group_size(const PackedMatrix& w, const F& f) {
  switch (w.group_size) {
  case 32:
    return f.template operator()<kFields, 32>();
  case 64:
    return f.template operator()<kFields, 64>();
  default:
    return f.template operator()<kFields, 128>();
  }
}

template <typename F> void for_format(const PackedMatrix& w, const F& f) {
  w.bits == 4 ? for_group_size<fields_of(4)>(w, f) : for_group_size<fields_of(8)>(w, f);
}

} // namespace
} // namespace q4metal::cpu
